"""Stage 1: a KL-regularised autoencoder of pictures of shapes, 8 times smaller along each axis, 4 channels.

    python examples/shapes/train_autoencoder.py FOLDER [--steps N] [--batch N] [--seed N]

The loss: L1, L2, the differences of neighbouring pixels at three scales (in place of a perceptual network, of which
there is none to download), a patch discriminator for the last part, and the KL divergence. Most steps see windows of a
quarter of the picture, around a shape; the last ones see it whole. Stopped, by SIGINT or SIGTERM, it saves its state in
FOLDER and continues from there when it is started again. At the end `FOLDER/vae` holds the averaged weights in float16,
scaled so that the latents times 0.18215 have the standard deviation 1, as Stable Diffusion's do.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from scenes import KINDS, random_scene, render
from torch import Tensor, nn
from training import Ema, Log, learning_rate, run, set_rate, write_whole

CONFIG: Mapping[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (16, 32, 96, 128),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "scaling_factor": 0.18215,
    "force_upcast": False,
}
PEAK_RATE, WARMUP = 6e-4, 100
DISCRIMINATOR_RATE = 2e-4
SQUARE_WEIGHT = 8.0  # L1 alone is slow to find the colours: after 300 steps 17.9 dB, and with 8 times L2 20.8 dB
GRADIENT_WEIGHT, KL_WEIGHT = 1.0, 1e-6
ADVERSARIAL_WEIGHT = 0.1  # the norm of its gradient at the picture, as a part of the reconstruction's
ADVERSARIAL_FROM = 0.85  # of all steps
WHOLE_FROM = 0.8  # of all steps; a step on windows takes a quarter of the time
FIRST_LOG_VARIANCE = -6.0  # of the latents: with 0 the noise hides what the encoder says for hundreds of steps
HINT_STEPS = 1000  # in which the first latent channels are drawn, less and less, to the mean colours of their pixels
DECAY = 0.999
HELD_OUT_SEED, HELD_OUT_COUNT = 1_000_000, 64
MEASURED_COUNT = 512  # pictures that the spread of the latents is taken from


def pictures(seed: int, first: int, count: int, side: int, *, window: bool = False, held_out: bool = False) -> Tensor:
    """Scenes number `first` and on of the endless row that belongs to `seed`. -> (N, 3, H, W) in [−1, 1]

    window: half as high and wide, cut out of the picture somewhere around one of its shapes.
    """
    images = []
    for i in range(first, first + count):
        rng = np.random.default_rng((seed, i))
        scene = random_scene(rng, KINDS[i % len(KINDS)], held_out=held_out)
        image = render(scene, side)
        if window:
            item = scene.items[rng.integers(len(scene.items))]
            x, y = (int(np.clip((c + rng.uniform(-0.5, 0)) * side, 0, side // 2)) for c in (item.x, item.y))
            image = image[y : y + side // 2, x : x + side // 2]
        images.append(image)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return (pixels.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def edges(x: Tensor) -> list[Tensor]:
    """Differences of neighbouring pixels, of the picture and of its halves and quarters."""
    found = []
    for _ in range(3):
        found += [x[:, :, 1:] - x[:, :, :-1], x[:, :, :, 1:] - x[:, :, :, :-1]]
        x = F.avg_pool2d(x, 2)
    return found


def reconstruction_loss(x: Tensor, target: Tensor) -> Tensor:
    gradients = [F.l1_loss(a, b) for a, b in zip(edges(x), edges(target), strict=True)]
    pixels = F.l1_loss(x, target) + SQUARE_WEIGHT * F.mse_loss(x, target)
    return pixels + GRADIENT_WEIGHT * torch.stack(gradients).mean()


class Discriminator(nn.Sequential):
    """(N, 3, H, W) -> (N, 1, H/8, W/8): how real each patch looks."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 24, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(24, 48, 4, 2, 1),
            nn.GroupNorm(4, 48),
            nn.LeakyReLU(0.2),
            nn.Conv2d(48, 96, 4, 2, 1),
            nn.GroupNorm(8, 96),
            nn.LeakyReLU(0.2),
            nn.Conv2d(96, 1, 3, 1, 1),
        )


class Trainer:
    """All that a step changes. What it does depends on this and its number alone, so that a stop changes nothing."""

    def __init__(self, *, steps: int, batch: int, side: int, seed: int) -> None:
        self.steps, self.batch, self.side, self.seed = steps, batch, side, seed
        torch.manual_seed(seed)
        self.model = AutoencoderKL(**CONFIG, sample_size=side).to(memory_format=torch.channels_last)
        nn.init.constant_(self.model.quant_conv.bias[CONFIG["latent_channels"] :], FIRST_LOG_VARIANCE)
        self.ema = Ema(AutoencoderKL(**CONFIG, sample_size=side), self.model, DECAY)
        self.judge = Discriminator()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), PEAK_RATE, betas=(0.9, 0.99), weight_decay=0.0)
        self.judge_optimizer = torch.optim.AdamW(self.judge.parameters(), DISCRIMINATOR_RATE, betas=(0.5, 0.99))

    def state_dict(self) -> dict[str, Any]:
        parts = (self.model, self.ema.model, self.judge, self.optimizer, self.judge_optimizer)
        return {"parts": [part.state_dict() for part in parts], "batch": self.batch, "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        parts = (self.model, self.ema.model, self.judge, self.optimizer, self.judge_optimizer)
        for part, values in zip(parts, state["parts"], strict=True):
            part.load_state_dict(values)

    def step(self, number: int) -> dict[str, float]:
        torch.manual_seed(self.seed * 1_000_003 + number)
        set_rate(self.optimizer, learning_rate(number, self.steps, peak=PEAK_RATE, warmup=WARMUP))
        window = number < WHOLE_FROM * self.steps
        images = pictures(self.seed, number * self.batch, self.batch, self.side, window=window)
        posterior = self.model.encode(images).latent_dist
        x = self.model.decode(posterior.sample()).sample
        kl = posterior.kl().mean()
        hint = max(1 - number / HINT_STEPS, 0.0) * F.mse_loss(posterior.mean[:, :3], F.avg_pool2d(images, 8))
        loss = reconstruction_loss(x, images)
        (gradient,) = torch.autograd.grad(loss, x)
        losses = {"loss": loss.item(), "l1": F.l1_loss(x, images).item(), "kl": kl.item()}
        if number >= ADVERSARIAL_FROM * self.steps:
            gradient += self._adversarial(x, gradient)
            losses["judge"] = self._train_judge(images, x.detach())
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward([x, KL_WEIGHT * kl + hint], [gradient, None])
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.ema.update(number)
        return losses

    def _adversarial(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The discriminator's gradient at the picture `x`, in proportion to the reconstruction's."""
        shown = x.detach().requires_grad_()
        (found,) = torch.autograd.grad(-self.judge(shown).mean(), shown)
        return found * (ADVERSARIAL_WEIGHT * gradient.norm() / found.norm().clamp_min(1e-12))

    def _train_judge(self, real: Tensor, fake: Tensor) -> float:
        loss = 0.5 * (F.relu(1 - self.judge(real)).mean() + F.relu(1 + self.judge(fake)).mean())
        self.judge_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.judge_optimizer.step()
        return loss.item()


@torch.no_grad()
def psnr(model: Any, images: Tensor) -> float:
    """In dB, of the mean square error over all pictures, after rounding to 8 bits."""
    error = 0.0
    for part in images.split(8):
        decoded = model.decode(model.encode(part).latent_dist.mode()).sample.clamp(-1, 1)
        error += float(((decoded * 127.5).round() / 127.5 - part).square().sum())
    return 10 * math.log10(4 * images.numel() / error)


@torch.no_grad()
def scale_latents(model: Any, images: Tensor) -> float:
    """Scales the latents, and what the decoder does with them back, to the standard deviation 1 / scaling_factor.

    -> their standard deviation before it.
    """
    latents = torch.cat([model.encode(part).latent_dist.mode() for part in images.split(8)])
    deviation = float(latents.std())
    factor = 1 / (model.config.scaling_factor * deviation)
    channels = model.config.latent_channels
    for parameter in model.quant_conv.parameters():
        parameter[:channels] *= factor
    model.quant_conv.bias[channels:] += 2 * math.log(factor)
    model.post_quant_conv.weight /= factor
    return deviation


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the autoencoder.")
    parser.add_argument("folder", type=Path, help="for the state, the log, and the result in vae/")
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--side", type=int, default=128, help="of the pictures, in pixels")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    trainer = Trainer(steps=options.steps, batch=options.batch, side=options.side, seed=options.seed)
    log = Log(options.folder / "autoencoder.jsonl")
    state_file = options.folder / "autoencoder.pt"
    first, seconds = 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        trainer.load_state_dict(state)
        first, seconds = state["step"], state["seconds"]
    held_out = pictures(HELD_OUT_SEED, 0, HELD_OUT_COUNT, options.side, held_out=True)

    def save(done: int, seconds: float) -> dict[str, object]:
        write_whole(state_file, {**trainer.state_dict(), "step": done, "seconds": seconds})
        return {"psnr": round(psnr(trainer.ema.model, held_out), 2)}

    if run(trainer.step, first=first, last=options.steps, batch=options.batch, seconds=seconds, log=log, save=save):
        model: Any = trainer.ema.model
        deviation = scale_latents(model, pictures(options.seed, 0, MEASURED_COUNT, options.side))
        model.to(torch.float16).save_pretrained(options.folder / "vae")
        log(finished=True, latents_std=round(deviation, 4), psnr=round(psnr(model.float(), held_out), 2))


if __name__ == "__main__":
    main()
