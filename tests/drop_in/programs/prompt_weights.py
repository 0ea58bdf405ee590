"""Words in (parentheses:1.4) count more, as far as a few lines can do it."""

import os
import re

import torch
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained(os.environ["MODEL"], safety_checker=None)
device = pipe.device


def weighted(text, negative):
    pieces = re.split(r"\(([^:]+):([\d.]+)\)", text)
    plain = "".join(piece for i, piece in enumerate(pieces) if i % 3 != 2)
    embeds, negative_embeds = pipe.encode_prompt(
        plain, device=device, num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt=negative
    )
    for word, weight in zip(pieces[1::3], pieces[2::3], strict=True):
        without, _ = pipe.encode_prompt(plain.replace(word, ""), device, 1, False)
        embeds = without + float(weight) * (embeds - without)
    return embeds, negative_embeds


embeds, negative_embeds = weighted("a (red:1.5) cat with a (hat:0.6), oil on canvas", "blurry")
print(embeds.shape, embeds.dtype, embeds.shape == negative_embeds.shape)
images = pipe(
    prompt_embeds=embeds,
    negative_prompt_embeds=negative_embeds,
    num_images_per_prompt=2,
    num_inference_steps=5,
    generator=torch.Generator().manual_seed(11),
).images
for i, image in enumerate(images):
    image.save(f"weighted_{i}.png")

# longer than the window: 75 tokens each, one after the other
long = "a very long description of a very small house, " * 6
ids = pipe.tokenizer(long, truncation=False, return_tensors="pt").input_ids
empty = pipe.tokenizer("", padding="max_length", max_length=ids.shape[-1], return_tensors="pt").input_ids
print(ids.shape, empty.shape, pipe.tokenizer.model_max_length)
window = pipe.tokenizer.model_max_length
parts, empties = [], []
for i in range(0, ids.shape[-1], window):
    parts.append(pipe.text_encoder(ids[:, i : i + window].to(device))[0])
    empties.append(pipe.text_encoder(empty[:, i : i + window].to(device))[0])
image = pipe(
    prompt_embeds=torch.cat(parts, dim=1),
    negative_prompt_embeds=torch.cat(empties, dim=1),
    num_inference_steps=4,
    generator=torch.Generator().manual_seed(11),
).images[0]
image.save("long.png")
