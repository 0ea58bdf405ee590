"""A caller's function after every row: what it is handed, and what its changes do.

The protocol is that of diffusers' `callback_on_step_end`. What a callback gets as its pipeline is a view of one call,
so that changing `_guidance_scale` there changes no other call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastldm import tasks
from fastldm.arguments import FLOATS, MAX_TOKENS, flag, is_plain
from fastldm.errors import ArgumentError, RefusedError, brief
from fastldm.request import CALLBACK_TENSORS, Request, Scales, check_scales
from fastldm.runtime.engine import Run

WHERE = "callback_on_step_end"
_MAY_BE_SET = ("_guidance_scale", "_guidance_rescale", "_image_guidance_scale", "_interrupt")


class CallView:
    """A pipeline during one call: it has all of the pipeline's attributes, and the state of this call.

    May be set: `_guidance_scale`, `_guidance_rescale`, `_image_guidance_scale`, for the rows to come; `_interrupt`,
    which ends the loop: what is there is decoded.
    """

    __slots__ = (
        "_clip_skip",
        "_guidance_rescale",
        "_guidance_scale",
        "_image_guidance_scale",
        "_interrupt",
        "_interval",
        "_num_timesteps",
        "_pipeline",
        "_task",
    )

    def __init__(self, pipeline: Any, asked: Request, rows: int) -> None:
        state = {
            "_pipeline": pipeline,
            "_task": asked.task,
            "_guidance_scale": asked.scales.text,
            "_guidance_rescale": asked.scales.rescale,
            "_image_guidance_scale": asked.scales.image,
            "_interval": asked.scales.interval,
            "_interrupt": False,
            "_clip_skip": asked.words.clip_skip or None,
            "_num_timesteps": rows,
        }
        for name, value in state.items():
            object.__setattr__(self, name, value)

    guidance_scale = property(lambda self: self._guidance_scale)
    guidance_rescale = property(lambda self: self._guidance_rescale)
    image_guidance_scale = property(lambda self: self._image_guidance_scale)
    clip_skip = property(lambda self: self._clip_skip)
    interrupt = property(lambda self: self._interrupt)
    num_timesteps = property(lambda self: self._num_timesteps)
    cross_attention_kwargs = property(lambda self: None)
    do_classifier_free_guidance = property(lambda self: self.scales().branches > 1)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _MAY_BE_SET:
            reason = f"a callback may set {', '.join(_MAY_BE_SET)}, and the tensors that it returns"
            raise RefusedError(f"{brief(name)} cannot be set in a callback: {reason}", field=WHERE)
        object.__setattr__(self, name, flag(name, value) if name == "_interrupt" else value)

    def scales(self) -> Scales:
        set_here = (self._guidance_scale, self._image_guidance_scale, self._guidance_rescale)
        scales = Scales(self._task, *set_here, interval=self._interval)
        try:
            return check_scales(scales)
        except ArgumentError as error:
            raise ArgumentError(f"{WHERE}: set the pipeline's _{error}", field=WHERE) from None

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._pipeline(*args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_pipeline"), name)


class Watched:
    """A run whose caller has a function called after every row."""

    def __init__(self, pipeline: Any, asked: Request, run: Run) -> None:
        self.asked, self.run = asked, run
        self.view = CallView(pipeline, asked, run.job.table.rows)
        self.scales = asked.scales

    def goes_on(self, row: int) -> bool:
        """Calls the function after a row, and applies what it changed; False if the loop is to end."""
        function = self.asked.callback
        assert function is not None
        before = {name: self._tensor(name) for name in self.asked.callback_tensors}
        handed = {name: None if t is None else t.clone() for name, t in before.items()}
        answer = function(self.view, row, self._timestep(row), dict(handed))
        if not isinstance(answer, dict):
            raise _wrong(f"returned {brief(answer)}: it must return its dict of tensors")
        for name in answer:
            if name not in CALLBACK_TENSORS[self.asked.task]:
                raise _wrong(f"returned {brief(name)}, which is none of {', '.join(CALLBACK_TENSORS[self.asked.task])}")
        after = {**handed, **answer}
        changed = {name: t for name, t in after.items() if _differs(t, before.get(name))}
        for name, t in changed.items():
            if _is_finite(before.get(name)) and not _is_finite(_tensor_of(t, name)):
                raise _wrong(f"returned for {name} NaN, infinity or what float32 cannot hold")
        self._apply(changed)
        return not self.view._interrupt

    def _timestep(self, row: int) -> Tensor:
        table = self.run.job.table
        return torch.tensor(table.timesteps[row], dtype=torch.int64 if table.integers else torch.float32)

    def _tensor(self, name: str) -> Tensor | None:
        """As diffusers hands it: branch by branch, the unconditional one first, for instruct-pix2pix the last."""
        job, batch, branches = self.run.job, self.asked.batch, self.scales.branches
        if name == "latents":
            return self.run.latents
        if name == "negative_prompt_embeds":
            return job.states[:batch] if branches > 1 else None
        return self._ordered(self._conditions()[name])

    def _ordered(self, t: Tensor) -> Tensor:
        """From our order of the branches, which ends with the conditional one, to diffusers', and back."""
        return torch.cat(t.split(self.asked.batch)[::-1]) if self.asked.task == "instruct" else t

    def _conditions(self) -> dict[str, Tensor]:
        """What each branch sees, (branches · batch, ...), in our order."""
        job, found = self.run.job, {"prompt_embeds": self.run.job.states}
        if job.inpainting is not None:
            found["mask"] = job.inpainting.mask.repeat(self.scales.branches, 1, 1, 1)
        elif self.asked.task == "inpaint" and job.extra_channels is not None:
            found["mask"], found["masked_image_latents"] = job.extra_channels[:, :1], job.extra_channels[:, 1:]
        elif job.extra_channels is not None:
            found["image_latents"] = job.extra_channels
        return found

    def _apply(self, changed: dict[str, Any]) -> None:
        if "latents" in changed:
            self.run.latents.copy_(_like(changed.pop("latents"), "latents", self.run.latents.shape))
        scales = self.view.scales()
        if not changed and scales == self.scales:
            return
        rows = scales.branches * self.asked.batch
        found = {
            name: self._fitted(name, self._ordered(_tensor_of(changed[name], name)) if name in changed else t, t, rows)
            for name, t in self._conditions().items()
        }
        if "negative_prompt_embeds" in changed and scales.branches > 1:
            states, batch = found["prompt_embeds"], self.asked.batch
            negative = _like(changed["negative_prompt_embeds"], "negative_prompt_embeds", states[:batch].shape)
            found["prompt_embeds"] = torch.cat((negative.to(states), states[batch:]))
        self.scales = scales
        self.run.change(guidance=tasks.guidance(scales, self.run.job.table), **self._fields(found))

    def _fitted(self, name: str, t: Tensor, now: Tensor, rows: int) -> Tensor:
        """With `rows` rows: where there are fewer branches than now, the last ones.

        What cuts off guidance may hand back one row for a batch of one prompt.
        """
        if len(t) == 1 and rows == self.asked.batch and self.asked.words.count == 1:
            t = t.expand(rows, *t.shape[1:])
        elif len(t) == len(now) > rows:
            t = t[-rows:]
        other = name == "prompt_embeds" and t.ndim == 3 and 1 <= t.shape[1] <= MAX_TOKENS
        tokens = t.shape[1:2] if other else now.shape[1:2]  # embeddings may have another length
        return _like(t, name, (rows, *tokens, *now.shape[2:])).to(now)

    def _fields(self, found: dict[str, Tensor]) -> dict[str, Any]:
        """Of the job."""
        fields: dict[str, Any] = {"states": found.pop("prompt_embeds")}
        inpainting = self.run.job.inpainting
        if inpainting is not None:
            fields["inpainting"] = replace(inpainting, mask=found["mask"][-self.asked.batch :])
        elif found:
            fields["extra_channels"] = torch.cat(list(found.values()), dim=1)
        return fields


def _differs(t: Any, before: Tensor | None) -> bool:
    if not isinstance(t, Tensor) or before is None or not is_plain(t) or t.dtype not in FLOATS:
        return t is not before
    return t.shape != before.shape or not torch.allclose(t.to(before), before, rtol=0, atol=0, equal_nan=True)


def _is_finite(t: Tensor | None) -> bool:
    return t is None or bool(torch.isfinite(t.float()).all())


def _tensor_of(t: Any, name: str) -> Tensor:
    if not isinstance(t, Tensor) or t.dtype not in FLOATS or not is_plain(t) or not t.ndim or not len(t):
        raise _wrong(f"returned for {name} {brief(type(t).__name__)}, must be a dense tensor of floats")
    return t.detach()


def _like(t: Any, name: str, shape: Sequence[int]) -> Tensor:
    found = _tensor_of(t, name)
    if tuple(found.shape) != tuple(shape):
        raise _wrong(f"returned for {name} the shape {tuple(found.shape)}, must be {tuple(shape)}")
    return found


def _wrong(reason: str) -> ArgumentError:
    return ArgumentError(f"{WHERE}: {reason}", field=WHERE)
