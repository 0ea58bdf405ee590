import os

import torch
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image, ImageDraw

pipe = StableDiffusionInpaintPipeline.from_pretrained(os.environ["MODEL"])
pipe = pipe.to("cuda" if torch.cuda.is_available() else "cpu")

photo = Image.radial_gradient("L").resize((48, 32))
photo = Image.merge("RGB", (photo, photo.rotate(90), photo.transpose(Image.Transpose.FLIP_TOP_BOTTOM)))
mask = Image.new("L", photo.size, 0)
ImageDraw.Draw(mask).ellipse((12, 6, 36, 26), fill=255)

image = pipe(
    prompt="a yellow cat, high resolution, sitting on a park bench",
    image=photo,
    mask_image=mask,
    height=32,
    width=48,
    num_inference_steps=6,
    generator=torch.Generator().manual_seed(0),
).images[0]
image.save("cat_on_bench.png")

# keep everything outside of the mask
Image.composite(image, photo, mask).save("composite.png")

image = pipe(
    prompt="a dog",
    image=photo,
    mask_image=mask,
    strength=0.7,
    height=32,
    width=48,
    padding_mask_crop=4,
    num_inference_steps=6,
    generator=torch.Generator().manual_seed(1),
).images[0]
print(image.size)
image.save("dog_close_up.png")
