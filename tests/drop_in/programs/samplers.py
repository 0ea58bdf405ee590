import os

import torch
from diffusers import StableDiffusionPipeline
from diffusers.schedulers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

pipe = StableDiffusionPipeline.from_pretrained(os.environ["MODEL"], safety_checker=None)
original = pipe.scheduler.config

pipe.scheduler = DPMSolverMultistepScheduler.from_config(original, use_karras_sigmas=True)
image = pipe("a castle", num_inference_steps=5, generator=torch.Generator().manual_seed(7)).images[0]
image.save("dpm_karras.png")
print(pipe.scheduler.config.use_karras_sigmas, pipe.scheduler.config["solver_order"])

for kind in (DDIMScheduler, EulerAncestralDiscreteScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler):
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    image = pipe("a castle", num_inference_steps=4, generator=torch.Generator().manual_seed(7)).images[0]
    image.save(f"{kind.__name__}.png")

pipe.scheduler = DPMSolverMultistepScheduler.from_config(
    original, algorithm_type="sde-dpmsolver++", timestep_spacing="trailing"
)
pipe("a castle", num_inference_steps=4, generator=torch.Generator().manual_seed(7)).images[0].save("sde.png")
