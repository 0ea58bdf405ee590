"""Stage 2: the U-Net and the text encoder of a small Stable Diffusion, trained together on the latents of stage 1.

    python examples/shapes/train_denoiser.py FOLDER [--steps N] [--reading N] [--singles N] [--batch N] [--scenes N]

FOLDER is that of `train_autoencoder.py`. The scenes are drawn and encoded once, into FOLDER/latents.npy; their captions
are worded anew each time they are seen. In the first steps the text encoder learns to read (`reading.py`), the next see
single shapes only. Stopped, by SIGINT or SIGTERM, it saves its state and continues from there when it is started again;
`--start MODEL` begins with the weights of a written model instead, and without these two phases. However a run ends,
FOLDER/model holds the averaged weights as a whole pipeline; `--steps 0` does only that.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from looking import Looker
from numpy.typing import NDArray
from reading import Reader, answers
from scenes import Scene, caption, random_scene, render
from torch import Tensor, nn
from training import Ema, Log, learning_rate, run, set_rate, write_whole
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from vocabulary import END, POSITIONS, START, write_tokenizer

WIDTH = 128  # of the text
UNET: Mapping[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (64, 128, 128),
    # Attention on 8 × 8 and 4 × 4 alone: on 16 × 16 it would take a third of the time.
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 8,  # the number of heads, whatever the name says
}
TEXT: Mapping[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": WIDTH // 64,
    "max_position_embeddings": POSITIONS,
}
SCHEDULE: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}
SCHEDULER: Mapping[str, Any] = {
    **SCHEDULE,
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
PEAK_RATE, WARMUP = 5e-4, 300
MOST_SNR = 5.0  # above this signal-to-noise ratio a timestep counts less
# Noise that all of a channel has in common. Without it the mean of the noisiest latents still tells the background,
# which would then be read off the noise that a picture begins with and not off its caption (arXiv 2305.08891).
OFFSET = 0.15
DROPOUT = 0.1  # of the captions, so that there is something to guide away from
# Of the captions, so many are those of other scenes, as some always are outside of such a little world. Where a caption
# contradicts what is already to be seen, the denoiser then follows what is to be seen, so that guidance of 7.5 does not
# go too far in every step: with 500 steps of it at a falling rate 23 of 24 single shapes had the right colour, not 17.
MISMATCHED = 0.2
MISMATCHED_STEPS = 0.2  # of the steps
DECAY = 0.9995
WEIGHTS: Mapping[str, float] = {"loss": 1.0, "reading": 0.05, "looking": 0.2}  # reading.py, looking.py
READ = ("relation", "relation", "relation", "relation", "pair", "pair", "single", "triple")
MIXTURE = ("single", "relation", "pair", "relation", "single", "relation", "pair", "triple")
HELD_OUT_SEED, HELD_OUT_COUNT = 2_000_000, 256
ENCODED_AT_ONCE = 32


def scenes_of(seed: int, count: int, *, held_out: bool = False) -> list[Scene]:
    kinds = (MIXTURE[i % len(MIXTURE)] for i in range(count))
    return [random_scene(np.random.default_rng((seed, i)), kind, held_out=held_out) for i, kind in enumerate(kinds)]


# ------------------------------------------------------------------------------------------------------------- latents


@torch.no_grad()
def encode(vae: Any, scenes: Sequence[Scene]) -> Tensor:
    """-> (N, 4, H/8, W/8), of standard deviation 1"""
    images = np.stack([render(scene, vae.config.sample_size) for scene in scenes])
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return vae.encode(x).latent_dist.mode() * vae.config.scaling_factor


def cached_latents(folder: Path, vae: Any, scenes: Sequence[Scene], log: Log) -> NDArray[np.float16]:
    """The latents of all scenes, from `latents.npy` as far as they are there. Begins anew for another vae or scenes."""
    side = vae.config.sample_size // 8
    shape = (len(scenes), 4, side, side)
    maker = hashlib.sha256(repr([*scenes[:100], len(scenes)]).encode())
    for tensor in vae.state_dict().values():
        maker.update(tensor.numpy().tobytes())
    data, progress = folder / "latents.npy", folder / "latents.json"
    known = json.loads(progress.read_text()) if progress.exists() and data.exists() else {}
    done = int(known["done"]) if known.get("maker") == maker.hexdigest() else 0
    if done == len(scenes):
        return np.asarray(np.load(data, mmap_mode="r"))
    mode: Any = "r+" if done else "w+"
    latents = np.lib.format.open_memmap(data, mode, np.float16, shape)
    began, first, logged = time.monotonic(), done, time.monotonic()
    while done < len(scenes):
        part = scenes[done : done + ENCODED_AT_ONCE]
        latents[done : done + len(part)] = encode(vae, part).half().numpy()
        done += len(part)
        if time.monotonic() - logged > 30 or done == len(scenes):
            latents.flush()
            progress.write_text(json.dumps({"maker": maker.hexdigest(), "done": done}))
            logged = time.monotonic()
            log(encoded=done, samples_per_s=round((done - first) / (logged - began), 1))
    return np.asarray(latents)


# -------------------------------------------------------------------------------------------------------------- models


def new_models(vocab: Mapping[str, int], side: int) -> nn.ModuleDict:
    """The U-Net for latents of `side`, and the text encoder."""
    ids = {"bos_token_id": vocab[START], "eos_token_id": vocab[END], "pad_token_id": vocab[END]}
    text = CLIPTextModel(CLIPTextConfig(vocab_size=len(vocab), **TEXT, **ids))
    return nn.ModuleDict({"unet": UNet2DConditionModel(sample_size=side, **UNET), "text_encoder": text})


def write_model(folder: Path, vae: Any, models: nn.ModuleDict) -> None:
    """A folder that StableDiffusionPipeline loads, in float16. `models` and `vae` are left as they are."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    write_tokenizer(unfinished / "tokenizer")
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_config(vae.config),
        unet=UNet2DConditionModel.from_config(models["unet"].config),
        text_encoder=CLIPTextModel(models["text_encoder"].config),
        tokenizer=CLIPTokenizer.from_pretrained(unfinished / "tokenizer"),
        scheduler=DPMSolverMultistepScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.vae.load_state_dict(vae.state_dict())
    pipe.unet.load_state_dict(models["unet"].state_dict())
    pipe.text_encoder.load_state_dict(models["text_encoder"].state_dict())
    pipe.to(torch.float16).save_pretrained(unfinished)
    shutil.rmtree(unfinished / "tokenizer")
    write_tokenizer(unfinished / "tokenizer")  # not as this version of transformers spells it
    # diffusers adds an infinity, which no JSON has.
    scheduler = {"_class_name": type(pipe.scheduler).__name__, **SCHEDULER}
    _write_json(unfinished / "scheduler/scheduler_config.json", scheduler)
    # transformers 5 would load what is stored as float16 in that, beside the other parts in float32.
    config = unfinished / "text_encoder/config.json"
    _write_json(config, {**json.loads(config.read_text(encoding="utf-8")), "dtype": "float32"})
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------ training


def random_timesteps(count: int, steps: int, generator: torch.Generator) -> Tensor:
    """More of the noisy ones, of density √t: there the caption decides on background, number and places."""
    return (torch.rand(count, generator=generator) ** (2 / 3) * steps).long().clamp(max=steps - 1)


def weight(snr: Tensor) -> Tensor:
    """Of a timestep's error, by its signal-to-noise ratio.

    1 + 1 / SNR would make it the error of v (Salimans & Ho, arXiv 2202.00512), most of which is in timesteps where no
    model can know the picture; 1 would hardly count those where the caption decides. This is between the two. Almost
    clean latents count less (Hang et al., arXiv 2303.09556).
    """
    return (1 + 1 / snr).sqrt() * (MOST_SNR / snr).clamp(max=1)


class Trainer:
    """All that a step changes. What it does depends on this and its number alone, so that a stop changes nothing."""

    def __init__(
        self,
        scenes: Sequence[Scene],
        latents: NDArray[np.float16],
        tokenizer: Any,
        *,
        steps: int,
        reading: int,
        singles: int,
        batch: int,
        seed: int,
    ) -> None:
        self.scenes, self.latents, self.tokenizer = scenes, latents, tokenizer
        self.steps, self.reading, self.singles, self.batch, self.seed = steps, reading, singles, batch, seed
        self.alone = np.array([i for i, scene in enumerate(scenes) if len(scene.items) == 1])
        # Relations count twice: they are the hardest.
        self.every = np.array([i for i, scene in enumerate(scenes) for _ in range(2 if scene.relation else 1)])
        self.alphas = DDPMScheduler(**SCHEDULE).alphas_cumprod
        vocab, side = tokenizer.get_vocab(), latents.shape[-1]
        torch.manual_seed(seed)
        self.models = new_models(vocab, side)
        self.ema = Ema(new_models(vocab, side), self.models, DECAY)
        self.models["unet"].to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.reader, self.looker = Reader(WIDTH), Looker(self.models["unet"])
        self.trained = nn.ModuleList([self.models, self.reader, self.looker])
        self.optimizer = torch.optim.AdamW(
            self.trained.parameters(), PEAK_RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )

    def start_from(self, model: Path) -> None:
        pipe = StableDiffusionPipeline.from_pretrained(model)
        for part in (self.models, self.ema.model):
            part["unet"].load_state_dict(pipe.unet.state_dict())
            part["text_encoder"].load_state_dict(pipe.text_encoder.state_dict())

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in (self.trained, self.ema.model, self.optimizer)]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        parts: tuple[Any, ...] = (self.trained, self.ema.model, self.optimizer)
        for part, values in zip(parts, state["parts"], strict=True):
            part.load_state_dict(values)

    def step(self, number: int) -> dict[str, float]:
        reads = number < self.reading
        done, steps = (number, self.reading) if reads else (number - self.reading, self.steps - self.reading)
        set_rate(self.optimizer, learning_rate(done, steps, peak=PEAK_RATE, warmup=WARMUP))
        rng = np.random.default_rng((self.seed, 1, number))
        losses = self.read(rng) if reads else self.paint(number, rng)
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack([WEIGHTS[name] * loss for name, loss in losses.items()]).sum().backward()
        nn.utils.clip_grad_norm_(self.trained.parameters(), 1.0)
        self.optimizer.step()
        self.ema.update(number)
        return {name: loss.item() for name, loss in losses.items()}

    def read(self, rng: np.random.Generator) -> dict[str, Tensor]:
        """With scenes of its own: nobody has to encode them."""
        scenes = [random_scene(rng, str(kind)) for kind in rng.choice(READ, self.batch)]
        captions = [caption(scene, rng) for scene in scenes]
        states = self.states(self.models, captions)
        return {"reading": self.reader(states, [answers(*pair) for pair in zip(scenes, captions, strict=True)])}

    def paint(self, number: int, rng: np.random.Generator) -> dict[str, Tensor]:
        pool = self.alone if number < self.reading + self.singles else self.every
        chosen, others = rng.choice(pool, (2, self.batch))
        late = number >= self.steps * (1 - MISMATCHED_STEPS)
        told = np.where(late & (rng.random(self.batch) < MISMATCHED), others, chosen)
        captions = ["" if rng.random() < DROPOUT else caption(self.scenes[i], rng) for i in told]
        known = [answers(self.scenes[i], text) for i, text in zip(told, captions, strict=True)]
        x0, states = torch.from_numpy(self.latents[chosen]).float(), self.states(self.models, captions)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        loss = self.loss(self.models, x0, states, generator)
        matches = torch.from_numpy(told == chosen) & torch.tensor([text != "" for text in captions])
        return {
            "loss": loss,
            "reading": self.reader(states, known),
            "looking": self.looker([self.scenes[i] for i in chosen], matches),
        }

    def loss(self, models: nn.ModuleDict, x0: Tensor, states: Tensor, generator: torch.Generator) -> Tensor:
        """The mean square error of the predicted noise, of one timestep for each of `x0`, weighted."""
        timesteps = random_timesteps(len(x0), len(self.alphas), generator)
        noise = torch.randn(x0.shape, generator=generator)
        noise += OFFSET * torch.randn(*x0.shape[:2], 1, 1, generator=generator)
        alphas = self.alphas[timesteps]
        x = alphas.sqrt()[:, None, None, None] * x0 + (1 - alphas).sqrt()[:, None, None, None] * noise
        error = (models["unet"](x, timesteps, states).sample - noise).square().mean((1, 2, 3))
        return (error * weight(alphas / (1 - alphas))).mean()

    def states(self, models: nn.ModuleDict, captions: Sequence[str]) -> Tensor:
        found = self.tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt")
        return models["text_encoder"](found.input_ids).last_hidden_state

    @torch.no_grad()
    def held_out(self, scenes: Sequence[Scene], x0: Tensor) -> dict[str, float]:
        """The losses of the averaged weights, always with the same noise and wording."""
        captions = [caption(scene, np.random.default_rng(i)) for i, scene in enumerate(scenes)]
        states = self.states(self.ema.model, captions)
        loss = self.loss(self.ema.model, x0, states, torch.Generator().manual_seed(HELD_OUT_SEED))
        reading = self.reader(states, [answers(*pair) for pair in zip(scenes, captions, strict=True)])
        return {"held_out_loss": round(loss.item(), 5), "held_out_reading": round(reading.item(), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the U-Net and the text encoder.")
    parser.add_argument("folder", type=Path, help="with vae/; for the latents, the state, the log, and model/")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--reading", type=int, default=1000, help="how many of the steps are the text encoder's alone")
    parser.add_argument("--singles", type=int, default=2500, help="how many of the next ones see single shapes only")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--scenes", type=int, default=40_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, metavar="MODEL", help="begin with its weights, at step 0")
    options = parser.parse_args()
    if options.start is not None:
        options.reading = options.singles = 0

    log = Log(options.folder / "denoiser.jsonl")
    vae = AutoencoderKL.from_pretrained(options.folder / "vae").eval()
    write_tokenizer(options.folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(options.folder / "tokenizer")
    scenes = scenes_of(options.seed, options.scenes)
    trainer = Trainer(
        scenes,
        cached_latents(options.folder, vae, scenes, log),
        tokenizer,
        steps=options.steps,
        reading=options.reading,
        singles=options.singles,
        batch=options.batch,
        seed=options.seed,
    )
    state_file = options.folder / "denoiser.pt"
    first, seconds = 0, 0.0
    if options.start is not None:
        trainer.start_from(options.start)
    elif state_file.exists():
        state = torch.load(state_file, weights_only=True)
        trainer.load_state_dict(state)
        first, seconds = state["step"], state["seconds"]
    unseen = scenes_of(HELD_OUT_SEED, HELD_OUT_COUNT, held_out=True)
    x0 = encode(vae, unseen)

    def save(done: int, seconds: float) -> Mapping[str, object]:
        write_whole(state_file, {**trainer.state_dict(), "step": done, "seconds": seconds})
        return trainer.held_out(unseen, x0)

    run(trainer.step, first=first, last=options.steps, batch=options.batch, seconds=seconds, log=log, save=save)
    write_model(options.folder / "model", vae, trainer.ema.model)


if __name__ == "__main__":
    main()
