import os

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.schedulers import DDIMScheduler

pipe = StableDiffusionPipeline.from_pretrained(os.environ["MODEL"], safety_checker=None)
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
height, width, frames = 32, 32, 4


def slerp(t, a, b):
    cosine = torch.sum(a / a.norm() * b / b.norm()).clamp(-1, 1)
    angle = torch.acos(cosine)
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


shape = (1, pipe.unet.config.in_channels, height // pipe.vae_scale_factor, width // pipe.vae_scale_factor)
start = torch.randn(shape, generator=torch.Generator().manual_seed(1), device="cpu", dtype=pipe.unet.dtype)
end = torch.randn(shape, generator=torch.Generator().manual_seed(2), device="cpu", dtype=pipe.unet.dtype)
cat, negative = pipe.encode_prompt("a cat", pipe.device, 1, True, negative_prompt="")
dog, _ = pipe.encode_prompt("a dog", pipe.device, 1, False)
print(tuple(start.shape), tuple(cat.shape))

arrays = []
for frame, t in enumerate(np.linspace(0, 1, frames)):
    result = pipe(
        prompt_embeds=torch.lerp(cat, dog, float(t)),
        negative_prompt_embeds=negative,
        latents=slerp(float(t), start, end),
        height=height,
        width=width,
        num_inference_steps=4,
    )
    result.images[0].save(f"frame_{frame:03}.png")
    arrays.append(np.asarray(result.images[0]))

# the same noise, another prompt
for name in ("owl", "fox"):
    pipe(f"a {name}", latents=start, height=height, width=width, num_inference_steps=4).images[0].save(f"{name}.png")
print(len(arrays), arrays[0].shape, arrays[0].dtype)
