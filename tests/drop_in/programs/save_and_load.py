import os

import torch
from diffusers import StableDiffusionPipeline
from diffusers.schedulers import EulerDiscreteScheduler

pipe = StableDiffusionPipeline.from_pretrained(os.environ["MODEL"], safety_checker=None)
pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
pipe.save_pretrained("copy", safe_serialization=True)
del pipe

pipe = StableDiffusionPipeline.from_pretrained("copy", local_files_only=True)
print(pipe.scheduler.config.timestep_spacing, pipe.scheduler.config.beta_schedule)
print(sorted(name for name in os.listdir("copy") if os.path.isdir(os.path.join("copy", name))))
image = pipe("a bridge", num_inference_steps=4, generator=torch.Generator().manual_seed(4)).images[0]
image.save("bridge.png")
