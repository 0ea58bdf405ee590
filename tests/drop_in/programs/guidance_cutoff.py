import os

import torch
from diffusers import StableDiffusionPipeline
from diffusers.callbacks import SDCFGCutoffCallback

pipe = StableDiffusionPipeline.from_pretrained(os.environ["MODEL"], safety_checker=None)
prompt = "a photo of an astronaut riding a horse on mars"


def dynamic_guidance(pipe, step_index, timestep, callback_kwargs):
    if step_index == int(pipe.num_timesteps * 0.4):
        callback_kwargs["prompt_embeds"] = callback_kwargs["prompt_embeds"].chunk(2)[-1]
        pipe._guidance_scale = 0.0
    print(step_index, int(timestep), pipe.guidance_scale, pipe.do_classifier_free_guidance)
    return callback_kwargs


images = pipe(
    prompt,
    num_images_per_prompt=2,
    num_inference_steps=8,
    generator=torch.Generator().manual_seed(1),
    callback_on_step_end=dynamic_guidance,
    callback_on_step_end_tensor_inputs=["prompt_embeds"],
).images
for i, image in enumerate(images):
    image.save(f"own_{i}.png")

image = pipe(
    prompt,
    num_inference_steps=8,
    generator=torch.Generator().manual_seed(1),
    callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.4),
).images[0]
image.save("official.png")
print(pipe(prompt, num_inference_steps=2, generator=torch.Generator().manual_seed(1)).images[0].size)
