import os

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained(os.environ["MODEL"], safety_checker=None)


def generator():
    return torch.Generator("cpu").manual_seed(8)


options = {"prompt": "a bowl of fruit", "num_inference_steps": 5, "num_images_per_prompt": 2}
images, nsfw = pipe(**options, generator=generator(), return_dict=False)
images[1].save("second.png")
print(type(images).__name__, nsfw)

array = pipe(**options, generator=generator(), output_type="np").images
print(array.shape, array.dtype)
np.save("array.npy", array)

tensor = pipe(**options, generator=generator(), output_type="pt")[0]
print(tensor.shape, tensor.dtype, tensor.device)
torch.save(tensor, "tensor.pt")

output = pipe(**options, generator=generator(), output_type="latent")
latents = output["images"]
torch.save(latents, "latents.pt")
with torch.no_grad():
    image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
image = (image / 2 + 0.5).clamp(0, 1)
print(image.shape, torch.allclose(image, tensor, atol=1e-3))
torch.save(image, "decoded.pt")

# and back again
with torch.no_grad():
    posterior = pipe.vae.encode(image * 2 - 1).latent_dist
torch.save(posterior.mode() * pipe.vae.config.scaling_factor, "mode.pt")
torch.save(posterior.sample(generator=generator()), "sample.pt")
