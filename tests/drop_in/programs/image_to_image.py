import os

import numpy as np
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image

pipe = StableDiffusionImg2ImgPipeline.from_pretrained(os.environ["MODEL"], safety_checker=None)

# a sketch: blue sky, green ground, a yellow sun
sketch = np.zeros((50, 70, 3), dtype=np.uint8)
sketch[:30] = (90, 150, 230)
sketch[30:] = (40, 120, 40)
sketch[5:12, 50:57] = (250, 230, 60)
init_image = Image.fromarray(sketch).convert("RGB").resize((48, 32))
init_image.save("sketch.png")

generator = torch.Generator().manual_seed(3)
for strength in (0.3, 0.75, 1.0):
    image = pipe(
        prompt="a fantasy landscape, trending on artstation",
        image=init_image,
        strength=strength,
        guidance_scale=7.5,
        num_inference_steps=8,
        generator=generator,
    ).images[0]
    image.save(f"landscape_{int(strength * 100)}.png")

images = pipe(
    prompt=["a landscape in winter", "a landscape in autumn"],
    image=[init_image, init_image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)],
    negative_prompt=["people", "people"],
    num_inference_steps=6,
    generator=generator,
).images
for season, image in zip(["winter", "autumn"], images, strict=True):
    image.save(f"{season}.png")
