import os

import torch
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained(
    os.environ["MODEL"], torch_dtype=torch.float32, low_cpu_mem_usage=True, safety_checker=None, feature_extractor=None
)

try:
    pipe.enable_xformers_memory_efficient_attention()
except Exception:
    pipe.enable_attention_slicing()
pipe.enable_attention_slicing("max")
if hasattr(pipe, "enable_vae_slicing"):  # older versions
    pipe.enable_vae_slicing()
    pipe.enable_vae_tiling()
else:
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
pipe.unet.to(memory_format=torch.channels_last)
if torch.cuda.is_available():
    pipe.enable_model_cpu_offload()
pipe.set_progress_bar_config(leave=False, disable=True)
pipe.unet.eval()
pipe.vae.requires_grad_(False)

images = pipe(
    "a city at night", num_images_per_prompt=3, num_inference_steps=3, generator=torch.Generator().manual_seed(2)
).images
for i, image in enumerate(images):
    image.save(f"small_{i}.png")

# larger than a tile of the decoder
large = pipe("a city at night", height=48, width=80, num_inference_steps=3, generator=torch.Generator().manual_seed(2))
large.images[0].save("large.png")

pipe.vae.disable_tiling()
pipe.vae.disable_slicing()
pipe.disable_attention_slicing()
pipe("a city", height=48, width=80, num_inference_steps=3, generator=torch.manual_seed(2)).images[0].save("whole.png")
if hasattr(pipe, "maybe_free_model_hooks"):
    pipe.maybe_free_model_hooks()
