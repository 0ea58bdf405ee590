"""A sampler as data, and the builder with which the functions of `samplers.py` write it down.

state (K slots): state[0] is x, the others are history. For each row r, with e the network's output for
in_scale[r]·x at timesteps[r]:
    x0        = clamp(p[r]·x + q[r]·e, ±limit[r])                                    also the preview
    state'[i] = Σ_j a[r,i,j]·state[j] + b[r,i]·e + c[r,i]·noise_r + d[r,i]·x0
    state'[0] = m·state'[0] + (1 − m)·(u[r]·z0 + v[r]·n0)                            inpainting
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastldm.errors import ConfigError
from fastldm.sampling.config import SchedulerConfig
from fastldm.sampling.schedules import Floats, Grid

Form = NDArray[np.float64]  # coefficients over (state[0..K-1], e, noise, clamped x0)
Pair = tuple[float, float]  # weights of the clean image and of the noise


@dataclass(frozen=True, eq=False)
class Brownian:
    """Noise that is one Brownian motion over sigma: row r takes its increment, scaled to unit variance."""

    spans: Floats  # (R, 2): from which sigma to which; both 0 where the row has no noise
    halfway: NDArray[np.bool_]  # (R,): whether the increment ends halfway in log sigma
    low: float
    high: float
    seed: int | None  # of the motion; None: one draw from the caller's generator


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """A sampler for one run: R rows, one for each call of the network; K slots of state. Arrays are float64."""

    timesteps: Floats  # (R,): what the network is told
    integers: bool  # whether the hub's class keeps its timesteps as integers
    in_scale: Floats  # (R,)
    a: Floats  # (R, K, K)
    b: Floats  # (R, K)
    c: Floats  # (R, K)
    d: Floats  # (R, K)
    p: Floats  # (R,)
    q: Floats  # (R,)
    limit: Floats  # (R,): infinite where x0 is not clipped
    u: Floats  # (R,): inpainting puts u·z0 + v·n0 behind the mask after the row; 1, 0 after the last
    v: Floats  # (R,)
    draws: NDArray[np.bool_]  # (R,): whether noise is drawn, which diffusers does in some rows where c = 0
    ends_step: NDArray[np.bool_]  # (R,): whether progress bars and callbacks count a step after the row
    start: Pair  # (0, init_noise_sigma): x = v0·n0 of a run from pure noise
    start_from_image: Pair  # x = u0·z0 + v0·n0 of a run that starts from an image at the first row
    brownian: Brownian | None  # where the noise is not drawn afresh for each row

    @property
    def rows(self) -> int:
        return len(self.timesteps)

    @property
    def slots(self) -> int:
        return int(self.a.shape[1])

    @property
    def steps(self) -> int:
        return int(self.ends_step.sum())


class Rows:
    """Collects the rows of a table.

    `state`, `e` and `noise` are the unit vectors of linear forms, so that `0.5 * rows.x + h * rows.e` is itself the
    row that the table needs. For each call of the network: `read` its output, then `add` the new state.
    """

    def __init__(self, config: SchedulerConfig, grid: Grid, slots: int) -> None:
        unit = np.eye(slots + 3)
        self.config, self.grid, self.slots = config, grid, slots
        self.state: list[Form] = list(unit[:slots])
        self.x, self.e, self.noise, self.clamped = unit[0], unit[slots], unit[slots + 1], unit[slots + 2]
        self.zero = np.zeros(slots + 3)
        self.x0, self.in_scale, self.limit = self.zero, 1.0, math.inf
        self.columns: dict[str, list[Any]] = {}

    def read(self, alpha: float, sigma: float, *, clip: bool = False) -> tuple[Form, Form]:
        """(x0, ε) of x = alpha·x0 + sigma·ε from the network's output; x0 clamped if the configuration says so."""
        config, data = self.config, self.config.sigma_data
        if config.kind.startswith("edm"):  # Karras et al., arXiv 2206.00364, table 1
            self.in_scale = float((sigma**2 + data**2) ** -0.5)
            sign = -1.0 if config.prediction_type == "v_prediction" else 1.0
            x0 = self.in_scale**2 * data**2 * self.x + sign * self.in_scale * sigma * data * self.e
            eps = (self.x - x0) / sigma
        else:
            s = self.in_scale = float((alpha**2 + sigma**2) ** -0.5) if self.grid.unit_input else 1.0
            x0, eps = predict(config.prediction_type, s * alpha, s * sigma, s * self.x, self.e)
        self.limit = math.inf
        if clip and config.clip_sample:  # without signal the hub clamps an infinite x0, and so do we
            self.limit, x0 = config.clip_sample_range, np.nan_to_num(x0, posinf=1e18, neginf=-1e18)
        self.x0 = x0
        return (self.clamped if self.limit < math.inf else x0), eps

    def add(
        self, i: int, state: Sequence[Form], *, t: float | None = None, draws: bool = False, ends: bool = True
    ) -> None:
        """The new slots, absent ones become zero, after the call of the network in step i, at timestep t[i] or t."""
        new = np.stack([*state, *[self.zero] * (self.slots - len(state))])
        row: dict[str, Any] = {"timesteps": float(self.grid.t[i] if t is None else t), "in_scale": self.in_scale}
        row |= {"a": new[:, :-3], "b": new[:, -3], "c": new[:, -2], "d": new[:, -1]}
        row |= {"p": self.x0[0], "q": self.x0[-3], "limit": self.limit, "draws": draws, "ends_step": ends}
        row["u"], row["v"] = self.grid.mixed(i + 1)
        for name, value in row.items():
            self.columns.setdefault(name, []).append(value)

    def table(self, begin: int, brownian: Brownian | None = None) -> SamplerTable:
        """All rows; `ConfigError` where one is not finite."""
        config, columns = self.config, {name: np.array(values) for name, values in self.columns.items()}
        for name in ("timesteps", "in_scale", "a", "b", "c", "d", "p", "q", "u", "v"):
            bad = ~np.isfinite(columns[name]).reshape(len(columns[name]), -1).all(1)
            if bad.any():
                what = f"{config.kind} with prediction_type {config.prediction_type!r} and these sigmas"
                where = f"is not finite at timestep {columns['timesteps'][bad.argmax()]:g}"
                why = ": rescale_betas_zero_snr leaves no signal there" if config.rescale_betas_zero_snr else ""
                raise ConfigError(f"{what} {where}{why}", field="prediction_type")
        start, image = (0.0, self.grid.start), self.grid.mixed(begin)
        return SamplerTable(
            **columns, integers=self.grid.integers, start=start, start_from_image=image, brownian=brownian
        )


def predict(kind: str, alpha: float, sigma: float, y: Form, e: Form) -> tuple[Form, Form]:
    """(x0, ε) from the network's output e for its input y = α x0 + σ ε."""
    if kind == "sample":
        return e, (y - alpha * e) / sigma
    if kind == "v_prediction":  # Salimans & Ho, arXiv 2202.00512, appendix D: v = α ε − σ x0
        return alpha * y - sigma * e, alpha * e + sigma * y
    if kind == "flow_prediction":  # Lipman et al., arXiv 2210.02747: v = ε − x0 where α + σ = 1
        return y - sigma * e, y + alpha * e
    return (y - sigma * e) / alpha, e


def combine(weights: Iterable[Any], forms: Iterable[Form]) -> Form:
    """Σ weights[k] · forms[k], as far as both go."""
    return np.sum([w * f for w, f in zip(weights, forms, strict=False)], axis=0, dtype=np.float64)
