"""Every sampler as a table: given the network's raw output, all of them update their state linearly.

    state (K slots): state[0] is x, the others are history. For each row r, with e the network's output for
    in_scale[r]·x at timesteps[r]:
        x0        = clamp(p[r]·x + q[r]·e, ±limit[r])                                    also the preview
        state'[i] = Σ_j a[r,i,j]·state[j] + b[r,i]·e + c[r,i]·noise_r + d[r,i]·x0
        state'[0] = m·state'[0] + (1 − m)·(u[r]·z0 + v[r]·n0)                            inpainting

A function here reads like its paper: `Rows` hands out x, e, noise and the history as vectors of coefficients, so
that `0.5 * x + h * e` is itself the row that the table needs. Letters: α, σ with x = α x0 + σ ε; `lam` = log(α/σ);
`h` a step in lam. `begin` is the first step of a run that starts in the middle; history starts there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastldm.errors import ArgumentError, ConfigError
from fastldm.sampling import schedules
from fastldm.sampling.config import SchedulerConfig
from fastldm.sampling.schedules import Floats

Form = NDArray[np.float64]  # coefficients over (state[0..K-1], e, noise, clamped x0)
Pair = tuple[float, float]  # weights of the clean image and of the noise


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """A sampler for one run: R rows, one for each call of the network; K slots of state. Arrays are float64."""

    timesteps: Floats  # (R,): what the network is told; integers for most samplers
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
    brownian: Floats | None = (
        None  # (R, 2): rows whose noise is a Brownian motion's increment between two sigmas
    )

    @property
    def rows(self) -> int:
        return len(self.timesteps)

    @property
    def slots(self) -> int:
        return self.a.shape[1]

    @property
    def steps(self) -> int:
        return int(self.ends_step.sum())


class Rows:
    """Collects the rows of a table. `state`, `e`, `noise`, `clamped` are the unit vectors of the linear forms."""

    def __init__(self, slots: int) -> None:
        unit = np.eye(slots + 3)
        self.slots = slots
        self.state: list[Form] = list(unit[:slots])
        self.x, self.e, self.noise, self.clamped = unit[0], unit[slots], unit[slots + 1], unit[slots + 2]
        self.zero = np.zeros(slots + 3)
        self.rows: list[dict[str, object]] = []

    def add(
        self,
        t: float,
        state: Sequence[Form],
        x0: Form,
        *,
        after: Pair,
        in_scale: float = 1.0,
        limit: float = math.inf,
        draws: bool = False,
        ends: bool = True,
        brownian: Pair = (0.0, 0.0),
    ) -> None:
        """One call of the network at `t`. state: the new slots, absent ones become zero. x0: what it predicts."""
        new = np.stack([*state, *[self.zero] * (self.slots - len(state))])
        self.rows.append(
            {
                "timesteps": float(t),
                "in_scale": float(in_scale),
                "a": new[:, : self.slots],
                "b": new[:, -3],
                "c": new[:, -2],
                "d": new[:, -1],
                "p": x0[0],
                "q": x0[-3],
                "limit": limit,
                "u": after[0],
                "v": after[1],
                "draws": draws,
                "ends_step": ends,
                "brownian": brownian,
            }
        )

    def table(self, start: float, start_from_image: Pair) -> SamplerTable:
        columns = {k: np.array([row[k] for row in self.rows]) for k in self.rows[0]}
        brownian = columns.pop("brownian")
        return SamplerTable(
            **columns,
            start=(0.0, float(start)),
            start_from_image=(float(start_from_image[0]), float(start_from_image[1])),
            brownian=brownian if brownian.any() else None,
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


def sampler_table(
    config: SchedulerConfig,
    steps: int,
    *,
    eta: float = 0.0,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    begin: int = 0,
    mu: float | None = None,
) -> SamplerTable:
    """The table of `steps` steps, from step `begin` on.

    eta: the share of noise, for DDIM and TCD. timesteps, sigmas: the caller's own, in place of `steps`.
    mu: the shift of a flow whose configuration says `use_dynamic_shifting`.
    Raises `ArgumentError` naming the argument, `ConfigError` where the configuration's numbers give no finite table.
    """
    run = Run(config, steps, eta, timesteps, sigmas, begin, mu)
    run.check()
    with np.errstate(all="ignore"):
        table = SAMPLERS[config.kind](run)
    for name in ("timesteps", "in_scale", "a", "b", "c", "d", "p", "q", "u", "v"):
        bad = ~np.isfinite(getattr(table, name)).reshape(table.rows, -1).all(1)
        if bad.any():
            t = table.timesteps[bad.argmax()]
            raise ConfigError(
                f"{config.kind} with prediction_type {config.prediction_type!r} and these sigmas is not finite at "
                f"timestep {t:g}" + (": no signal is left there" if config.rescale_betas_zero_snr else ""),
                field="prediction_type",
            )
    return table


@dataclass(frozen=True)
class Run:
    """The arguments of `sampler_table`."""

    config: SchedulerConfig
    steps: int
    eta: float = 0.0
    timesteps: Sequence[float] | None = None
    sigmas: Sequence[float] | None = None
    begin: int = 0
    mu: float | None = None

    def check(self) -> None:
        config = self.config
        if self.timesteps is not None and self.sigmas is not None:
            raise ArgumentError("timesteps and sigmas cannot be given together", field="timesteps")
        if self.timesteps is None and self.sigmas is None:
            schedules.check_steps(config, self.steps)
        for name, kinds in (("timesteps", TAKE_TIMESTEPS), ("sigmas", TAKE_SIGMAS)):
            if getattr(self, name) is not None and config.kind not in kinds:
                raise ArgumentError(
                    f"{name}: {config.kind} does not take them; {', '.join(kinds)} do", field=name
                )
        if isinstance(self.eta, bool) or not isinstance(self.eta, int | float) or not 0 <= self.eta <= 1:
            raise ArgumentError(f"eta = {self.eta!r}: must be from 0 to 1", field="eta")
        shaped = config.use_karras_sigmas or config.use_exponential_sigmas or config.use_beta_sigmas
        if self.timesteps is not None and (shaped or config.use_lu_lambdas):
            raise ArgumentError("timesteps: the configuration spaces the steps by sigma", field="timesteps")

    def first(self, count: int) -> range:
        """The steps of the run: begin, ..., count − 1."""
        begin = self.begin
        if isinstance(begin, bool) or not isinstance(begin, int | np.integer) or not 0 <= begin < count:
            raise ArgumentError(f"begin = {begin!r}: must be from 0 to {count - 1}", field="begin")
        return range(begin, count)


# ------------------------------------------------------------------------------------ discrete time: x = √ᾱ x0 + √(1−ᾱ) ε


def ddim(run: Run) -> SamplerTable:
    """Song et al., arXiv 2010.02502, equations 12 and 16."""
    config = run.config
    bar = schedules.alphas_cumprod(config).astype(np.float64)
    t = schedules.whole(config, schedules.spaced(config, run.steps))
    final = 1.0 if config.set_alpha_to_one else bar[0]
    rows, stride = Rows(1), config.num_train_timesteps // run.steps
    for i in run.first(len(t)):
        now, then = bar[t[i]], bar[t[i] - stride] if t[i] >= stride else final
        x0, eps = predict(config.prediction_type, now**0.5, (1 - now) ** 0.5, rows.x, rows.e)
        x0_used = rows.clamped if config.clip_sample else x0
        std = run.eta * ((1 - then) / (1 - now) * (1 - now / then)) ** 0.5
        x = then**0.5 * x0_used + max(1 - then - std**2, 0.0) ** 0.5 * eps + std * rows.noise
        limit = config.clip_sample_range if config.clip_sample else math.inf
        rows.add(t[i], [x], x0, limit=limit, draws=run.eta > 0, after=diffused(bar, t, i + 1))
    return rows.table(1.0, diffused(bar, t, run.begin))


def diffused(bar: Floats, t: NDArray[np.int64], i: int) -> Pair:
    """The weights of image and noise at step i; past the end, the image alone."""
    return (bar[t[i]] ** 0.5, (1 - bar[t[i]]) ** 0.5) if i < len(t) else (1.0, 0.0)


# -------------------------------------------------------------------------------------------- sigmas: x = x0 + σ ε


def sigma_schedule(run: Run) -> tuple[Floats, Floats]:
    """(timesteps, sigmas with the final one behind them) of the samplers of Karras et al., arXiv 2206.00364."""
    config, steps = run.config, run.steps
    training = schedules.training_sigmas(config)
    last = float(training[0]) if config.final_sigmas_type == "sigma_min" else 0.0
    if run.sigmas is not None:
        sigmas = schedules.given("sigmas", run.sigmas, 0.0, 1e6).astype(np.float32).astype(np.float64)
        if len(sigmas) < 2 or sigmas[-2] <= 0:
            raise ArgumentError(
                "sigmas: must hold at least one step and its end, which alone may be 0", field="sigmas"
            )
        t = schedules.sigma_to_t(sigmas[:-1], training)
    else:
        if run.timesteps is not None:
            t = schedules.given("timesteps", run.timesteps, 0, config.num_train_timesteps - 1)
        else:
            t = schedules.spaced(config, steps).astype(np.float32).astype(np.float64)
        steps = len(t)
        sigmas = np.interp(t, np.arange(len(training)), training)
        if config.interpolation_type == "log_linear":
            sigmas = np.exp(np.linspace(np.log(training[-1]), np.log(training[0]), steps + 1))
        low = sigmas[-1] if config.sigma_min is None else config.sigma_min
        high = sigmas[0] if config.sigma_max is None else config.sigma_max
        shaped = schedules.shaped(config, low, high, steps)
        if shaped is not None:
            sigmas, t = shaped, schedules.sigma_to_t(shaped, training)
        sigmas = np.append(sigmas, last)
    if config.timestep_type == "continuous" and config.prediction_type == "v_prediction":
        t = 0.25 * np.log(sigmas[: len(t)])
    return t.astype(np.float32).astype(np.float64), sigmas


def in_scale(sigma: float) -> float:
    """The network's input has unit variance where the data have."""
    return float((sigma**2 + 1) ** -0.5)


def predict_at(config: SchedulerConfig, sigma: float, x: Form, e: Form) -> Form:
    """x0 from the network's output for in_scale(σ)·x."""
    alpha = in_scale(sigma)
    return predict(config.prediction_type, alpha, sigma * alpha, alpha * x, e)[0]


def init_noise_sigma(config: SchedulerConfig, sigmas: Floats) -> float:
    most = float(sigmas.max())
    return (most**2 + 1) ** 0.5 if config.timestep_spacing == "leading" else most


def euler(run: Run) -> SamplerTable:
    """Karras et al., arXiv 2206.00364, algorithm 2 without churn."""
    t, sigmas = sigma_schedule(run)
    rows = Rows(1)
    for i in run.first(len(t)):
        x0 = predict_at(run.config, sigmas[i], rows.x, rows.e)
        slope = (rows.x - x0) / sigmas[i]
        x = rows.x + (sigmas[i + 1] - sigmas[i]) * slope
        rows.add(t[i], [x], x0, in_scale=in_scale(sigmas[i]), after=noised(sigmas, i + 1, len(t)))
    return rows.table(init_noise_sigma(run.config, sigmas), noised(sigmas, run.begin, len(t)))


def noised(sigmas: Floats, i: int, steps: int) -> Pair:
    """The weights of image and noise at step i; past the end, the image alone."""
    return (1.0, float(sigmas[i])) if i < steps else (1.0, 0.0)


SAMPLERS: dict[str, Callable[[Run], SamplerTable]] = {"ddim": ddim, "euler": euler}
TAKE_TIMESTEPS = ("ddpm", "euler", "heun", "dpm_multistep", "dpm_singlestep", "lcm", "tcd", "flow_euler")
TAKE_SIGMAS = ("euler", "unipc", "edm_euler", "flow_euler")
