"""Noise schedules: betas, their cumulated product, sigmas, and which timesteps a run visits.

    alphas_cumprod ᾱ_t      x_t = sqrt(ᾱ_t) x0 + sqrt(1 − ᾱ_t) n                         Ho et al., arXiv 2006.11239
    sigma          σ_t      sqrt((1 − ᾱ_t) / ᾱ_t): noise per signal                      Karras et al., arXiv 2206.00364
    lambda         λ        log(α / σ), half the log signal-to-noise ratio               Lu et al., arXiv 2206.00927

The training schedule is float32, because that is what models were trained with: 1 − ᾱ at small t changes by 1e-4
when it is not. Everything computed from it is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fastldm.errors import ArgumentError
from fastldm.sampling.config import MAX_STEPS, SchedulerConfig

Floats = NDArray[np.float64]
Floats32 = NDArray[np.float32]

# ᾱ of the last timestep where sigma must stay finite: the smallest positive float16.
TINY_ALPHA = 2.0**-24


def linspace32(start: float, stop: float, n: int) -> Floats32:
    """n equidistant float32 numbers, counted from the nearer end with one rounding each, as torch does."""
    first, last = np.float32(start), np.float32(stop)
    if n == 1:
        return np.array([first])
    step, i = np.float64((last - first) / np.float32(n - 1)), np.arange(n)
    return np.where(i < n // 2, first + step * i, last - step * (n - 1 - i)).astype(np.float32)


def _cosine(t: float) -> float:
    """Nichol & Dhariwal, arXiv 2102.09672, equation 17."""
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace(t: float) -> float:
    """Hang & Gu, arXiv 2407.03297, table 1."""
    lam = -0.5 * math.copysign(1.0, 0.5 - t) * math.log(1 - 2 * abs(0.5 - t) + 1e-6)
    snr = math.exp(lam)
    return math.sqrt(snr / (1 + snr))


_ALPHA_BAR: dict[str, Callable[[float], float]] = {
    "squaredcos_cap_v2": _cosine,
    "laplace": _laplace,
    "exp": lambda t: math.exp(-12.0 * t),
}


def betas(config: SchedulerConfig) -> Floats32:
    """The variance of the noise that each training timestep adds."""
    n, start, end = config.num_train_timesteps, config.beta_start, config.beta_end
    if config.trained_betas is not None:
        out = np.array(config.trained_betas, np.float32)
    elif config.beta_schedule == "linear":
        out = linspace32(start, end, n)
    elif config.beta_schedule == "scaled_linear":
        out = linspace32(start**0.5, end**0.5, n) ** 2
    elif config.beta_schedule == "sigmoid":
        out = (1 / (1 + np.exp(-linspace32(-6, 6, n)))) * np.float32(end - start) + np.float32(start)
    else:
        bar = _ALPHA_BAR[config.beta_schedule]
        out = np.array([min(1 - bar((i + 1) / n) / bar(i / n), 0.999) for i in range(n)], np.float32)
    return zero_terminal_snr(out) if config.rescale_betas_zero_snr else out


def zero_terminal_snr(b: Floats32) -> Floats32:
    """Shifts and scales sqrt(ᾱ) so that the last timestep is pure noise. Lin et al., arXiv 2305.08891, algorithm 1."""
    root = np.sqrt(_cumulated(b))
    first, last = root[0], root[-1]
    bar = ((root - last) * (first / (first - last))) ** 2
    return 1 - np.concatenate([bar[:1], bar[1:] / bar[:-1]])


def _cumulated(b: Floats32) -> Floats32:
    return np.cumprod((1 - b).astype(np.float64)).astype(np.float32)


def alphas_cumprod(config: SchedulerConfig, *, finite_sigma: bool = False) -> Floats32:
    """ᾱ_t for each training timestep. `finite_sigma`: a zero at the end becomes the smallest float16."""
    bar = _cumulated(betas(config))
    if finite_sigma and config.rescale_betas_zero_snr:
        bar[-1] = TINY_ALPHA
    return bar


def training_sigmas(config: SchedulerConfig) -> Floats32:
    """σ_t for each training timestep, rising."""
    bar = alphas_cumprod(config, finite_sigma=True)
    return np.sqrt((1 - bar) / bar)


# ---------------------------------------------------------------------------------------------------------- timesteps


def check_steps(config: SchedulerConfig, steps: int) -> None:
    """Raises `ArgumentError` where `steps` is no number of steps that this schedule can be cut into."""
    most = min(MAX_STEPS, config.num_train_timesteps)
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or not 1 <= steps <= most:
        raise ArgumentError(
            f"num_inference_steps = {steps!r}: must be an integer from 1 to {most}",
            field="num_inference_steps",
        )


def spaced(
    config: SchedulerConfig, steps: int, *, last: int | None = None, drop_last: bool = False
) -> Floats:
    """`steps` timesteps, falling. Lin et al., arXiv 2305.08891, table 2.

    last: how many training timesteps are in reach, from the clean end. drop_last: cut into one part more, and leave
    the clean end out.
    """
    total = config.num_train_timesteps
    last = total if last is None else last
    n = steps + 1 if drop_last else steps
    if config.timestep_spacing == "linspace":
        t = np.linspace(0, last - 1, n)[::-1]
    elif config.timestep_spacing == "leading":
        t = (np.arange(n) * float(last // n))[::-1] + config.steps_offset
    else:
        t = np.round(np.arange(last, 0, -total / steps)) - 1
    return t[:steps]


def whole(config: SchedulerConfig, t: Floats) -> NDArray[np.int64]:
    """Timesteps rounded to training timesteps; `ArgumentError` where one is outside the schedule."""
    out = np.round(t).astype(np.int64)
    if out.min() < 0 or out.max() >= config.num_train_timesteps:
        raise ArgumentError(
            f"num_inference_steps = {len(out)}: with {config.timestep_spacing} spacing and steps_offset = "
            f"{config.steps_offset} the run leaves the timesteps 0 to {config.num_train_timesteps - 1}",
            field="num_inference_steps",
        )
    return out


def given(name: str, values: Sequence[float], low: float, high: float, *, integers: bool = False) -> Floats:
    """The caller's own timesteps or sigmas: at most 1000 finite, strictly falling numbers in low..high."""
    try:
        out = np.asarray(list(values)[: MAX_STEPS + 2], np.float64)
    except (TypeError, ValueError):
        raise ArgumentError(f"{name}: must be a list of numbers", field=name) from None
    if out.ndim != 1 or not 1 <= len(out) <= MAX_STEPS + 1:
        raise ArgumentError(f"{name}: must hold 1 to {MAX_STEPS} numbers", field=name)
    if not np.isfinite(out).all() or out.min() < low or out.max() > high:
        raise ArgumentError(f"{name}: must be numbers from {low:g} to {high:g}", field=name)
    if integers and (out != np.round(out)).any():
        raise ArgumentError(f"{name}: must be integers", field=name)
    if (np.diff(out) >= 0).any():
        raise ArgumentError(f"{name}: must fall from each to the next", field=name)
    return out


# ------------------------------------------------------------------------------------------------------------- sigmas


def karras(low: float, high: float, steps: int, rho: float = 7.0) -> Floats:
    """Karras et al., arXiv 2206.00364, equation 5."""
    ramp = np.linspace(0, 1, steps)
    return np.asarray((high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho)


def exponential(low: float, high: float, steps: int) -> Floats:
    """Equidistant in log σ. Song et al., arXiv 2011.13456, the variance-exploding schedule."""
    return np.exp(np.linspace(math.log(high), math.log(low), steps))


def beta_quantiles(low: float, high: float, steps: int) -> Floats:
    """Quantiles of the Beta(0.6, 0.6) distribution between low and high. Lee et al., arXiv 2407.12173."""
    try:
        from scipy.stats import beta
    except ImportError:
        raise ArgumentError(
            "use_beta_sigmas needs scipy: pip install scipy", field="use_beta_sigmas"
        ) from None
    return np.asarray(low + beta.ppf(1 - np.linspace(0, 1, steps), 0.6, 0.6) * (high - low), np.float64)


def shaped(config: SchedulerConfig, low: float, high: float, steps: int) -> Floats | None:
    """The sigmas between two ends that the configuration names, or None where it names none."""
    if config.use_karras_sigmas:
        return karras(low, high, steps)
    if config.use_exponential_sigmas:
        return exponential(low, high, steps)
    return beta_quantiles(low, high, steps) if config.use_beta_sigmas else None


def sigma_to_t(sigmas: Floats, training: Floats32) -> Floats:
    """The (fractional) timestep of each sigma, linear in log σ between training timesteps."""
    log_sigmas, log_sigma = np.log(training), np.log(np.maximum(sigmas, 1e-10))
    i = np.clip(np.searchsorted(log_sigmas, log_sigma, side="right") - 1, 0, len(log_sigmas) - 2)
    low, high = log_sigmas[i], log_sigmas[i + 1]
    return np.asarray(i + np.clip((low - log_sigma) / (low - high), 0, 1), np.float64)
