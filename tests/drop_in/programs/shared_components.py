"""Three tasks, one set of weights in memory."""

import os

import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionPipeline
from PIL import Image

text2img = StableDiffusionPipeline.from_pretrained(os.environ["MODEL"], safety_checker=None)
img2img = StableDiffusionImg2ImgPipeline(**text2img.components, requires_safety_checker=False)
inpaint = StableDiffusionInpaintPipeline.from_pipe(text2img)
print(sorted(name for name, part in text2img.components.items() if part is not None))


def generator():
    return torch.Generator().manual_seed(21)


first = text2img("a harbour", num_inference_steps=5, generator=generator()).images[0]
first.save("first.png")
second = img2img("a harbour in fog", image=first, strength=0.5, num_inference_steps=6, generator=generator()).images[0]
second.save("second.png")
mask = Image.new("L", first.size)
mask.paste(255, (8, 8, 24, 28))
third = inpaint(
    prompt="a ship",
    image=second,
    mask_image=mask,
    height=first.height,
    width=first.width,
    num_inference_steps=5,
    generator=generator(),
).images[0]
third.save("third.png")
