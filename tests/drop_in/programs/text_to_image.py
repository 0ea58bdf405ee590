import os

import torch
from diffusers import StableDiffusionPipeline

device = "cuda" if torch.cuda.is_available() else "cpu"
pipe = StableDiffusionPipeline.from_pretrained(os.environ["MODEL"])
pipe = pipe.to(device)

prompt = "a photo of an astronaut riding a horse on mars"
generator = torch.Generator("cpu").manual_seed(1024)
image = pipe(prompt, generator=generator, num_inference_steps=6).images[0]
print(image.size, image.mode)
image.save("astronaut.png")

image = pipe(
    prompt,
    height=24,
    width=40,
    guidance_scale=9,
    negative_prompt="blurry, low quality",
    num_inference_steps=6,
    generator=generator,
).images[0]
image.save("astronaut_wide.png")
