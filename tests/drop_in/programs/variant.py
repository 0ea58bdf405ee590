import os

import torch
from diffusers import StableDiffusionPipeline

cuda = torch.cuda.is_available()
pipe = StableDiffusionPipeline.from_pretrained(
    os.environ["MODEL"],
    torch_dtype=torch.float16 if cuda else torch.float32,
    variant="fp16",
    use_safetensors=True,
    safety_checker=None,
    requires_safety_checker=False,
    low_cpu_mem_usage=True,
)
pipe.to("cuda" if cuda else "cpu")
pipe.set_progress_bar_config(disable=True)
print(pipe.device, pipe.unet.dtype, pipe.safety_checker is None)

with torch.inference_mode():
    result = pipe(prompt="a cat", num_inference_steps=4, generator=torch.manual_seed(0))
result.images[0].save("cat.png")
print(len(result.images), result.nsfw_content_detected)
