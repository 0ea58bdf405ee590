import argparse
import os

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image


def image_grid(images, rows, cols):
    width, height = images[0].size
    grid = Image.new("RGB", size=(cols * width, rows * height))
    for i, image in enumerate(images):
        grid.paste(image, box=(i % cols * width, i // cols * height))
    return grid


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=os.environ.get("MODEL"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args([])

    pipe = StableDiffusionPipeline.from_pretrained(args.model, safety_checker=None, torch_dtype=torch.float32)
    pipe.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    prompts = ["a red square", "a blue circle", "a green triangle"]
    seeds = [args.seed + i for i in range(2 * len(prompts))]
    generator = [torch.Generator(device="cpu").manual_seed(seed) for seed in seeds]
    images = pipe(
        prompt=prompts,
        negative_prompt=["text"] * len(prompts),
        num_images_per_prompt=2,
        num_inference_steps=args.steps,
        generator=generator,
    ).images
    image_grid(images, rows=3, cols=2).save("grid.png")

    # the fourth one again, alone
    again = pipe(prompts[1], negative_prompt="text", num_inference_steps=args.steps, generator=torch.manual_seed(3))
    again.images[0].save("fourth.png")
    print(len(images), {image.size for image in images})


if __name__ == "__main__":
    main()
