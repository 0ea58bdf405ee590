"""Saves a rough picture after every step, and stops when the user has seen enough."""

import os

import torch
from diffusers import StableDiffusionPipeline
from diffusers.schedulers import EulerDiscreteScheduler
from PIL import Image

pipe = StableDiffusionPipeline.from_pretrained(os.environ["MODEL"], safety_checker=None)
pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
pipe.set_progress_bar_config(disable=True)
kept = []


def rough(latents):
    """Four channels to RGB, without the decoder."""
    weights = torch.tensor([[60.0, -60.0, 25.0, -70.0], [60.0, -5.0, 15.0, -50.0], [60.0, 10.0, -5.0, -35.0]])
    rgb = torch.einsum("chw,rc->hwr", latents.float().cpu(), weights) + 140
    return Image.fromarray(rgb.clamp(0, 255).byte().numpy())


def on_step(pipe, step, timestep, tensors):
    latents = tensors["latents"]
    kept.append(latents)
    rough(latents[0]).resize((32, 32)).save(f"step_{step}.png")
    print(f"step {step} of {pipe.num_timesteps}, t = {timestep}, {tuple(latents.shape)}")
    if step == 4:
        pipe._interrupt = True
    return tensors


image = pipe(
    "a lighthouse", num_inference_steps=9, generator=torch.Generator().manual_seed(5), callback_on_step_end=on_step
).images[0]
image.save("stopped.png")
torch.save(torch.cat(kept), "kept.pt")

with torch.no_grad():
    decoded = pipe.vae.decode(kept[2] / pipe.vae.config.scaling_factor).sample
decoded = (decoded / 2 + 0.5).clamp(0, 1)
array = decoded.cpu().permute(0, 2, 3, 1).float().numpy()
Image.fromarray((array[0] * 255).round().astype("uint8")).save("decoded_step_2.png")
