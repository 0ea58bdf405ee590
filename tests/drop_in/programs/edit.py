import os

import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from diffusers.schedulers import EulerAncestralDiscreteScheduler
from PIL import Image, ImageOps

pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(
    os.environ["INSTRUCT_MODEL"], torch_dtype=torch.float32, safety_checker=None
)
pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)

image = Image.linear_gradient("L").resize((32, 40))
image = ImageOps.exif_transpose(ImageOps.colorize(image, "navy", "orange")).convert("RGB")
edited = pipe(
    "turn the sunset into a sunrise",
    image=image,
    num_inference_steps=6,
    image_guidance_scale=1.2,
    guidance_scale=6,
    generator=torch.manual_seed(42),
).images
edited[0].save("sunrise.png")
