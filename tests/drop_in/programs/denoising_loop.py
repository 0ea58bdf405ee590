"""The loop written by hand, from the parts of a pipeline."""

import os

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.schedulers import UniPCMultistepScheduler
from PIL import Image

pipe = StableDiffusionPipeline.from_pretrained(os.environ["MODEL"], safety_checker=None)
vae, unet, tokenizer, text_encoder = pipe.vae, pipe.unet, pipe.tokenizer, pipe.text_encoder
scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)

prompt = ["a photograph of an astronaut riding a horse"]
height = width = unet.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1)
steps, guidance_scale = 6, 7.5
device = unet.device

text = tokenizer(
    prompt, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
)
empty = tokenizer([""] * len(prompt), padding="max_length", max_length=text.input_ids.shape[-1], return_tensors="pt")
with torch.no_grad():
    embeddings = text_encoder(text.input_ids.to(device))[0]
    uncond_embeddings = text_encoder(empty.input_ids.to(device)).last_hidden_state
embeddings = torch.cat([uncond_embeddings, embeddings])

scheduler.set_timesteps(steps)
latents = torch.randn(
    (len(prompt), unet.config.in_channels, height // 2, width // 2), generator=torch.manual_seed(0), device=device
)
latents = latents * scheduler.init_noise_sigma
for t in scheduler.timesteps:
    latent_model_input = scheduler.scale_model_input(torch.cat([latents] * 2), timestep=t)
    with torch.no_grad():
        noise_pred = unet(latent_model_input, t, encoder_hidden_states=embeddings).sample
    noise_pred_uncond, noise_pred_text = noise_pred.chunk(2)
    noise_pred = noise_pred_uncond + guidance_scale * (noise_pred_text - noise_pred_uncond)
    latents = scheduler.step(noise_pred, t, latents).prev_sample
    print(int(t), tuple(noise_pred.shape))
torch.save(latents, "latents.pt")

with torch.no_grad():
    image = vae.decode(latents / vae.config.scaling_factor).sample
image = (image / 2 + 0.5).clamp(0, 1).squeeze().permute(1, 2, 0)
Image.fromarray((image.cpu().numpy() * 255).round().astype(np.uint8)).save("astronaut.png")
