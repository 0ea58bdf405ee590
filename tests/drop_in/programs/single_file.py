import os

import torch
from diffusers import StableDiffusionPipeline
from diffusers.schedulers import EulerAncestralDiscreteScheduler

pipe = StableDiffusionPipeline.from_single_file(
    os.environ["CHECKPOINT"],
    config=os.environ["MODEL"],
    torch_dtype=torch.float32,
    local_files_only=True,
    safety_checker=None,
)
pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
image = pipe(
    "masterpiece, a knight", num_inference_steps=5, guidance_scale=6.5, generator=torch.Generator().manual_seed(99)
).images[0]
image.save("knight.png")
