"""A few steps of both stages on small pictures: they learn, and a stop changes nothing."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reading
import torch
import train_autoencoder
import train_denoiser
import training
import vocabulary
from diffusers import AutoencoderKL, StableDiffusionPipeline
from scenes import render
from torch import Tensor
from transformers import CLIPTokenizer

import fastldm
from tests.oracle import relative_error

SIDE = 32
SMALL_VAE = {**train_autoencoder.CONFIG, "block_out_channels": (8, 8, 16, 16), "norm_num_groups": 2}
SMALL_UNET = {**train_denoiser.UNET, "block_out_channels": (32, 32, 32)}
SMALL_TEXT = {**train_denoiser.TEXT, "num_hidden_layers": 1}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_autoencoder, "CONFIG", SMALL_VAE)
    monkeypatch.setattr(train_autoencoder, "MEASURED_COUNT", 16)
    monkeypatch.setattr(train_autoencoder, "PEAK_RATE", 3e-3)
    for script in (train_autoencoder, train_denoiser):
        monkeypatch.setattr(script, "WARMUP", 5)
        monkeypatch.setattr(script, "HELD_OUT_COUNT", 8)
    monkeypatch.setattr(train_denoiser, "UNET", SMALL_UNET)
    monkeypatch.setattr(train_denoiser, "TEXT", SMALL_TEXT)


def autoencoder(*, steps: int = 6, batch: int = 2) -> train_autoencoder.Trainer:
    return train_autoencoder.Trainer(steps=steps, batch=batch, side=SIDE, seed=0)


def denoiser(tmp_path: Path, *, steps: int = 6, reading: int = 0, batch: int = 4) -> train_denoiser.Trainer:
    vocabulary.write_tokenizer(tmp_path / "tokenizer")
    scenes = train_denoiser.scenes_of(0, 24)
    latents = np.random.default_rng(0).standard_normal((24, 4, 8, 8)).astype(np.float16)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    numbers = {"steps": steps, "reading": reading, "singles": 3, "batch": batch, "seed": 0}
    return train_denoiser.Trainer(scenes, latents, tokenizer, **numbers)


def tensors(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return [tensor for value in values for tensor in tensors(value)]


@pytest.mark.parametrize("stage", ["autoencoder", "denoiser"])
def test_a_stop_changes_nothing(stage: str, tmp_path: Path) -> None:
    """Six steps, and three that are saved, read into a new trainer, and followed by three more."""
    new: Callable[[], Any] = autoencoder if stage == "autoencoder" else lambda: denoiser(tmp_path, reading=2)
    through, before, after = new(), new(), new()
    losses = [through.step(i) for i in range(6)]
    first = [before.step(i) for i in range(3)]
    training.write_whole(tmp_path / "state.pt", before.state_dict())
    torch.manual_seed(99)
    after.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert first + [after.step(i) for i in range(3, 6)] == losses
    pairs = list(zip(tensors(through.state_dict()), tensors(after.state_dict()), strict=True))
    assert len(pairs) > 100
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_autoencoder_learns_and_its_judge_joins() -> None:
    trainer = autoencoder(steps=40, batch=8)
    losses = [trainer.step(i) for i in range(40)]
    assert np.mean([x["loss"] for x in losses[-5:]]) < 0.8 * np.mean([x["loss"] for x in losses[:5]])
    assert ["judge" in x for x in losses] == [i >= 34 for i in range(40)]
    held_out = train_autoencoder.pictures(5, 0, 4, SIDE, held_out=True)
    fresh = train_autoencoder.psnr(autoencoder().model.eval(), held_out)
    assert train_autoencoder.psnr(trainer.ema.model, held_out) > fresh + 1


def test_the_discriminators_gradient_is_a_part_of_the_reconstructions() -> None:
    trainer = autoencoder()
    x, gradient = torch.randn(2, 3, SIDE, SIDE), torch.randn(2, 3, SIDE, SIDE)
    found = trainer._adversarial(x, gradient)
    assert found.norm().item() == pytest.approx(train_autoencoder.ADVERSARIAL_WEIGHT * gradient.norm().item(), rel=1e-5)
    better = x + 1e-2 * gradient.norm() * -found / found.norm()
    assert trainer.judge(better).mean() > trainer.judge(x).mean(), "downhill is more real"


def test_the_denoiser_learns(tmp_path: Path) -> None:
    trainer = denoiser(tmp_path, steps=30)
    x0, texts = torch.from_numpy(trainer.latents).float(), [""] * len(trainer.latents)

    @torch.no_grad()
    def loss() -> float:
        states = trainer.states(trainer.models, texts)
        return trainer.loss(trainer.models, x0, states, torch.Generator().manual_seed(1)).item()

    before = loss()
    for i in range(30):
        trainer.step(i)
    assert loss() < 0.9 * before


def test_the_text_encoder_learns_to_read_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_denoiser, "PEAK_RATE", 3e-3)
    trainer = denoiser(tmp_path, steps=200, reading=40, batch=32)
    before = {name: value.clone() for name, value in trainer.models["unet"].state_dict().items()}
    losses = [trainer.step(i) for i in range(40)]
    assert [set(step) for step in losses] == [{"reading"}] * 40
    assert np.mean([x["reading"] for x in losses[-5:]]) < 0.85 * np.mean([x["reading"] for x in losses[:5]])
    assert all(torch.equal(value, before[name]) for name, value in trainer.models["unet"].state_dict().items())
    trainer.batch = 4
    assert set(trainer.step(40)) == {"loss", "reading", "looking"}
    assert any(not torch.equal(value, before[name]) for name, value in trainer.models["unet"].state_dict().items())


def test_single_shapes_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = denoiser(tmp_path)
    seen: list[list[int]] = []

    def note(scene: Any, rng: Any) -> str:
        seen[-1].append(len(scene.items))
        return ""  # of which nothing is asked

    monkeypatch.setattr(train_denoiser, "caption", note)
    for i in range(6):
        seen.append([])
        trainer.step(i)
    assert {count for counts in seen[:3] for count in counts} == {1}
    assert max(count for counts in seen[3:] for count in counts) > 1


def nothing(models: Any, *_: Any) -> Tensor:
    """A loss without a U-Net."""
    return sum(p.sum() for p in models.parameters()) * 0.0


def test_some_captions_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = denoiser(tmp_path, batch=40)
    seen: list[str] = []

    def states(models: Any, captions: list[str]) -> Tensor:
        seen.extend(captions)
        return torch.zeros(len(captions), 1, train_denoiser.WIDTH)

    monkeypatch.setattr(trainer, "states", states)
    monkeypatch.setattr(trainer, "loss", nothing)
    monkeypatch.setattr(trainer.looker, "forward", lambda scenes, asked: torch.zeros(()))
    for i in range(20):
        trainer.step(i)
    dropped = sum(text == "" for text in seen) / len(seen)
    assert abs(dropped - train_denoiser.DROPOUT) < 4 * (0.1 * 0.9 / len(seen)) ** 0.5


def test_some_of_the_last_captions_are_those_of_other_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = denoiser(tmp_path, steps=140, batch=40)
    trainer.latents = np.broadcast_to(np.arange(24, dtype=np.float16)[:, None, None, None], (24, 4, 8, 8))
    texts: list[str] = []
    matches: list[list[bool]] = []
    asked: list[list[bool]] = []

    def states(models: Any, captions: list[str]) -> Tensor:
        texts[:] = captions
        return torch.zeros(len(captions), 1, train_denoiser.WIDTH)

    def loss(models: Any, x0: Tensor, states: Tensor, generator: Any) -> Tensor:
        drawn = [int(x[0, 0, 0]) for x in x0]
        matches.append([text == str(number) for text, number in zip(texts, drawn, strict=True) if text])
        return nothing(models)

    numbers = {id(scene): str(i) for i, scene in enumerate(trainer.scenes)}
    monkeypatch.setattr(train_denoiser, "caption", lambda scene, rng: numbers[id(scene)])
    monkeypatch.setattr(train_denoiser, "answers", lambda scene, text: [reading.NOT_ASKED] * len(reading.QUESTIONS))
    monkeypatch.setattr(trainer, "states", states)
    monkeypatch.setattr(trainer, "loss", loss)
    monkeypatch.setattr(
        trainer.looker, "forward", lambda scenes, found: asked.append(found.tolist()) or torch.zeros(())
    )
    late_at = round(140 * (1 - train_denoiser.MISMATCHED_STEPS))
    for i in range(late_at - 10, 140):
        trainer.step(i)
    assert all(itertools.chain.from_iterable(matches[:10]))
    late = list(itertools.chain.from_iterable(matches[10:]))
    share = train_denoiser.MISMATCHED * 23 / 24  # a scene may be drawn for itself
    assert abs(late.count(False) / len(late) - share) < 4 * (share * (1 - share) / len(late)) ** 0.5
    assert [flags.count(True) for flags in asked] == [flags.count(True) for flags in matches], (
        "the others see no looker"
    )


def test_the_looker_asks_the_unet_that_learns(tmp_path: Path) -> None:
    """Of features of a quarter and a half of the latents' sides; what it asks reaches what paints and what reads."""
    trainer = denoiser(tmp_path)
    scenes = trainer.scenes[:2]
    states = trainer.states(trainer.models, ["a red circle", "a blue star"])
    trainer.loss(trainer.models, torch.zeros(2, 4, 8, 8), states, torch.Generator().manual_seed(0))
    assert [tuple(seen.shape[-2:]) for seen in trainer.looker.seen.values()] == [(2, 2), (4, 4)]
    trainer.looker(scenes, torch.tensor([True, False])).backward()
    unet, text = trainer.models["unet"], trainer.models["text_encoder"]
    for weight in (unet.conv_in.weight, unet.mid_block.resnets[0].conv1.weight, next(text.parameters())):
        assert weight.grad is not None
        assert weight.grad.abs().max() > 0
    assert unet.conv_out.weight.grad is None


def test_timesteps_are_weighed_between_the_errors_of_noise_and_of_v(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = denoiser(tmp_path)
    snr = trainer.alphas / (1 - trainer.alphas)
    x0, states = torch.from_numpy(trainer.latents[:1]).float(), trainer.states(trainer.models, ["a red circle"])
    for seed in range(8):
        timestep = int(train_denoiser.random_timesteps(1, 1000, torch.Generator().manual_seed(seed)))
        weighed = trainer.loss(trainer.models, x0, states, torch.Generator().manual_seed(seed)).item()
        with monkeypatch.context() as patch:
            patch.setattr(train_denoiser, "weight", torch.ones_like)
            plain = trainer.loss(trainer.models, x0, states, torch.Generator().manual_seed(seed)).item()
        here = snr[timestep].item()
        assert weighed / plain == pytest.approx((1 + 1 / here) ** 0.5 * min(1.0, 5.0 / here), rel=1e-4)


def test_a_part_of_the_noise_is_common_to_a_channel(tmp_path: Path) -> None:
    """Of 64 pixels, whose mean would else be known up to 1/8."""
    trainer, seen = denoiser(tmp_path), []
    unet = trainer.models["unet"]
    unet.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[:2]))
    states = trainer.states(trainer.models, ["a red circle"] * 400)
    trainer.loss(trainer.models, torch.zeros(400, 4, 8, 8), states, torch.Generator().manual_seed(0))
    ((x, timesteps),) = seen
    noise = x / (1 - trainer.alphas[timesteps]).sqrt()[:, None, None, None]
    assert noise.mean((2, 3)).std().item() == pytest.approx((train_denoiser.OFFSET**2 + 1 / 64) ** 0.5, rel=0.06)


def test_noisy_timesteps_are_drawn_more_often() -> None:
    drawn = train_denoiser.random_timesteps(20_000, 1000, torch.Generator().manual_seed(0))
    assert drawn.min() >= 0
    assert drawn.max() == 999
    for below in (150, 460, 770):
        assert (drawn < below).float().mean().item() == pytest.approx((below / 1000) ** 1.5, abs=0.015)


def test_scaled_latents_have_sds_spread_and_decode_to_the_same_picture() -> None:
    model = autoencoder().model.eval()
    images = train_autoencoder.pictures(0, 0, 8, SIDE)
    with torch.no_grad():
        posterior = model.encode(images).latent_dist
        before, variance = model.decode(posterior.mode()).sample, posterior.var / posterior.mode().std() ** 2
        deviation = train_autoencoder.scale_latents(model, images)
        scaled = model.encode(images).latent_dist
        assert deviation == pytest.approx(posterior.mode().std().item(), rel=1e-5)
        assert (scaled.mode() * 0.18215).std().item() == pytest.approx(1, rel=1e-4)
        assert relative_error(model.decode(scaled.mode()).sample, before) < 1e-5
        assert relative_error(scaled.var / scaled.mode().std() ** 2, variance) < 1e-4


def test_the_average_follows_the_weights() -> None:
    source, model = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    ema = training.Ema(model, source, decay=0.9)
    assert torch.equal(ema.model.weight, source.weight)
    start = source.weight.item()
    with torch.no_grad():
        source.weight += 1.0
    ema.update(0)
    assert ema.model.weight.item() - start == pytest.approx(0.9, rel=1e-5)  # of the first steps' short memory
    ema.update(10_000)
    assert ema.model.weight.item() - start == pytest.approx(0.91, rel=1e-5)
    assert not ema.model.weight.requires_grad


def test_learning_rate() -> None:
    rates = [training.learning_rate(i, 100, peak=2.0, warmup=10) for i in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == max(rates) == 2.0
    assert rates[55] == pytest.approx(2.0 * (0.05 + 0.95 / 2))
    assert rates[100] == pytest.approx(0.1)


def test_a_signal_ends_the_run_after_its_step_and_saves(tmp_path: Path) -> None:
    saved: list[int] = []

    def step(number: int) -> dict[str, float]:
        if number == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"loss": float(number)}

    def save(done: int, seconds: float) -> dict[str, object]:
        saved.append(done)
        return {"psnr": 1.0}

    before = signal.getsignal(signal.SIGTERM)
    log = training.Log(tmp_path / "log.jsonl")
    assert not training.run(step, first=2, last=9, batch=3, seconds=0.0, log=log, save=save)
    assert saved == [5]
    assert signal.getsignal(signal.SIGTERM) is before
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert "command" in lines[0]
    assert lines[1]["step"] == 5
    assert lines[1]["loss"] == 3.0
    assert lines[2]["psnr"] == 1.0


def test_both_stages_make_a_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts as they are run; the folder draws the same with diffusers, without an argument, and with fastldm."""
    common = [str(tmp_path), "--batch", "2"]
    monkeypatch.setattr(sys, "argv", ["", *common, "--side", "64", "--steps", "2"])
    train_autoencoder.main()
    assert AutoencoderKL.load_config(tmp_path / "vae")["scaling_factor"] == 0.18215
    monkeypatch.setattr(
        sys, "argv", ["", *common, "--scenes", "40", "--steps", "3", "--reading", "1", "--singles", "1"]
    )
    train_denoiser.main()
    log = (tmp_path / "denoiser.jsonl").read_text()
    assert '"encoded": 40' in log
    assert all(name in log for name in ('"loss"', '"reading"', '"looking"', "held_out_loss", "held_out_reading"))
    first = {p.relative_to(tmp_path): p.read_bytes() for p in (tmp_path / "model").rglob("*") if p.is_file()}

    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    theirs.set_progress_bar_config(disable=True)
    ours = fastldm.Pipeline(tmp_path / "model")
    drawn = []
    for pipe in (ours, theirs):
        generator = torch.Generator().manual_seed(1)
        prompt = "a large green triangle above a small yellow circle"
        drawn.append(pipe(prompt, num_inference_steps=3, generator=generator, output_type="latent").images)
    assert relative_error(*drawn) <= 1e-4

    monkeypatch.setattr(sys, "argv", ["", *common, "--scenes", "40", "--steps", "0"])
    train_denoiser.main()
    assert {p.relative_to(tmp_path): p.read_bytes() for p in (tmp_path / "model").rglob("*") if p.is_file()} == first
    assert (tmp_path / "denoiser.jsonl").read_text().count("encoded") == 1, "the latents are kept"

    monkeypatch.setattr(
        sys, "argv", ["", *common, "--scenes", "40", "--steps", "1", "--start", str(tmp_path / "model")]
    )
    train_denoiser.main()
    assert torch.load(tmp_path / "denoiser.pt", weights_only=True)["step"] == 1
    lines = [json.loads(line) for line in (tmp_path / "denoiser.jsonl").read_text().splitlines()]
    assert "loss" in [line for line in lines if "samples_per_s" in line][-1], "it painted at once"


def test_the_latents_are_made_anew_for_another_autoencoder(tmp_path: Path) -> None:
    scenes, log = train_denoiser.scenes_of(0, 40), training.Log(tmp_path / "log.jsonl")
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(AutoencoderKL(**SMALL_VAE, sample_size=SIDE).eval())
    first = train_denoiser.cached_latents(tmp_path, models[0], scenes, log).copy()
    wanted = train_denoiser.encode(models[0], scenes)
    assert relative_error(torch.from_numpy(first).float(), wanted) < 1e-3
    image = torch.from_numpy(render(scenes[0], SIDE)).permute(2, 0, 1).float() / 127.5 - 1
    with torch.no_grad():
        latents = models[0].encode(image[None]).latent_dist.mode() * 0.18215
    assert relative_error(wanted[:1], latents) < 1e-5

    progress = json.loads((tmp_path / "latents.json").read_text())
    (tmp_path / "latents.json").write_text(json.dumps({**progress, "done": 32}))
    again = train_denoiser.cached_latents(tmp_path, models[0], scenes, log)
    assert np.array_equal(again, first)
    assert not np.array_equal(train_denoiser.cached_latents(tmp_path, models[1], scenes, log), first)
    assert not np.array_equal(
        train_denoiser.cached_latents(tmp_path, models[1], train_denoiser.scenes_of(1, 40), log), first
    )
