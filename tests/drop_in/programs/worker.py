"""What answers the requests of a small web service."""

import base64
import io
import os
import threading

import torch
from diffusers import StableDiffusionPipeline
from diffusers.schedulers import DPMSolverMultistepScheduler


class Painter:
    def __init__(self, model):
        self.lock = threading.Lock()
        self.pipe = StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32, safety_checker=None)
        self.pipe.scheduler = DPMSolverMultistepScheduler.from_config(self.pipe.scheduler.config)
        self.pipe.set_progress_bar_config(disable=True)
        self.progress = {}

    def paint(self, request):
        def report(pipe, step, timestep, tensors):
            self.progress[request["id"]] = (step + 1) / pipe.num_timesteps
            return tensors

        with self.lock:
            image = self.pipe(
                prompt=request["prompt"],
                negative_prompt=request.get("negative_prompt"),
                num_inference_steps=request.get("steps", 5),
                guidance_scale=request.get("guidance", 7.5),
                width=request.get("width", 32),
                height=request.get("height", 32),
                generator=torch.Generator().manual_seed(request.get("seed", 0)),
                callback_on_step_end=report,
            ).images[0]
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        return {"id": request["id"], "image": base64.b64encode(buffer.getvalue()).decode()}


painter = Painter(os.environ["MODEL"])
requests = [
    {"id": 1, "prompt": "a cat", "seed": 5},
    {"id": 2, "prompt": "a dog", "negative_prompt": "cat", "steps": 3, "width": 48},
    {"id": 3, "prompt": "a bird", "guidance": 1.0, "height": 16},
]
threads = []
answers = {}
for request in requests:
    threads.append(threading.Thread(target=lambda r=request: answers.setdefault(r["id"], painter.paint(r))))
    threads[-1].start()
for thread in threads:
    thread.join()
for number, answer in sorted(answers.items()):
    with open(f"answer_{number}.png", "wb") as f:
        f.write(base64.b64decode(answer["image"]))
print(painter.progress)
