"""Noise schedules: betas, their cumulated product, sigmas, and which timesteps a run visits.

    alphas_cumprod ᾱ_t      x_t = sqrt(ᾱ_t) x0 + sqrt(1 − ᾱ_t) n                         Ho et al., arXiv 2006.11239
    sigma          σ_t      sqrt((1 − ᾱ_t) / ᾱ_t): noise per signal                      Karras et al., arXiv 2206.00364
    lambda         λ        log(α / σ), half the log signal-to-noise ratio               Lu et al., arXiv 2206.00927

The training schedule is float32, because that is what models were trained with: 1 − ᾱ at small t changes by 1e-4
when it is not. Everything computed from it is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastldm.errors import ArgumentError, ConfigError
from fastldm.sampling.config import SchedulerConfig
from fastldm.sampling.run import Run, given, steps_error

Floats = NDArray[np.float64]
Floats32 = NDArray[np.float32]


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
        out = np.square(linspace32(start**0.5, end**0.5, n)).astype(np.float32)
    elif config.beta_schedule == "sigmoid":
        out = (1 / (1 + np.exp(-linspace32(-6, 6, n))) * np.float32(end - start) + np.float32(start)).astype(np.float32)
    else:
        bar = _ALPHA_BAR[config.beta_schedule]
        out = np.array([min(1 - bar((i + 1) / n) / bar(i / n), 0.999) for i in range(n)], np.float32)
    return zero_terminal_snr(out) if config.rescale_betas_zero_snr else out


def zero_terminal_snr(b: Floats32) -> Floats32:
    """Shifts and scales sqrt(ᾱ) so that the last timestep is pure noise. Lin et al., arXiv 2305.08891, algorithm 1."""
    root = np.sqrt(cumulated(b))
    first, last = root[0], root[-1]
    bar = ((root - last) * (first / (first - last))) ** 2
    return 1 - np.concatenate([bar[:1], bar[1:] / bar[:-1]])


def cumulated(b: Floats32) -> Floats32:
    return np.cumprod((1 - b).astype(np.float64)).astype(np.float32)


def alphas_cumprod(config: SchedulerConfig, *, finite_sigma: bool = False) -> Floats32:
    """ᾱ_t for each training timestep. `finite_sigma`: a zero at the end becomes the smallest float16."""
    bar = cumulated(betas(config))
    if finite_sigma and config.rescale_betas_zero_snr:
        bar[-1] = 2.0**-24
    return bar


def training_sigmas(config: SchedulerConfig) -> Floats32:
    """σ_t for each training timestep, rising. Raises `ConfigError` where no signal is left at the last."""
    bar = alphas_cumprod(config, finite_sigma=True)
    with np.errstate(divide="ignore"):
        sigmas: Floats32 = np.sqrt((1 - bar) / bar)
    if not np.isfinite(sigmas).all():
        raise ConfigError("these betas leave no signal at the last timestep: its sigma is infinite", field="beta_end")
    return sigmas


# ------------------------------------------------------------------------------------------------------- timesteps


def spaced(config: SchedulerConfig, steps: int, *, last: int | None = None, drop_last: bool = False) -> Floats:
    """`steps` timesteps, falling. Lin et al., arXiv 2305.08891, table 2.

    last: how many training timesteps are in reach, from the clean end. drop_last: cut into one part more, and leave
    the clean end out.
    """
    total = config.num_train_timesteps
    last = total if last is None else last
    n = steps + 1 if drop_last else steps
    if config.timestep_spacing == "linspace":
        return np.linspace(0, last - 1, n, dtype=np.float64)[::-1][:steps]
    if config.timestep_spacing == "leading":
        return np.arange(n, dtype=np.float64)[::-1][:steps] * (last // n) + config.steps_offset
    return np.asarray(np.round(np.arange(last, 0, -total / steps))[:steps] - 1, np.float64)


def whole(config: SchedulerConfig, t: Floats) -> NDArray[np.int64]:
    """Timesteps rounded to training timesteps; `ArgumentError` where one is outside the schedule."""
    out, last = np.round(t).astype(np.int64), config.num_train_timesteps - 1
    if out.min() < 0 or out.max() > last:
        spacing = f"{config.timestep_spacing} spacing and steps_offset = {config.steps_offset}"
        raise steps_error(len(out), f"with {spacing} the run leaves the timesteps 0 to {last}")
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
        raise ArgumentError("use_beta_sigmas needs scipy: pip install scipy", field="use_beta_sigmas") from None
    return np.asarray(low + beta.ppf(1 - np.linspace(0, 1, steps), 0.6, 0.6) * (high - low), np.float64)


def shaped(config: SchedulerConfig, low: float, high: float, steps: int) -> Floats | None:
    """The sigmas between two ends that the configuration names, or None where it names none."""
    if config.use_karras_sigmas:
        return karras(low, high, steps)
    if config.use_lu_lambdas:  # equidistant in λ = −log σ, between float32 logarithms; Lu et al., arXiv 2206.00927
        first, last = float(np.log(np.float32(high))), float(np.log(np.float32(low)))
        return np.exp(np.linspace(first, last, steps))
    if config.use_exponential_sigmas:
        return exponential(low, high, steps)
    return beta_quantiles(low, high, steps) if config.use_beta_sigmas else None


def sigma_to_t(sigmas: Floats, training: Floats32) -> Floats:
    """The (fractional) timestep of each sigma, linear in log σ between training timesteps."""
    log_sigmas, log_sigma = np.log(training), np.log(np.maximum(sigmas, 1e-10))
    i = np.clip(np.searchsorted(log_sigmas, log_sigma, side="right") - 1, 0, len(log_sigmas) - 2)
    low, high = log_sigmas[i], log_sigmas[i + 1]
    w = np.clip((low - log_sigma) / (low - high), 0, 1)
    return np.asarray((1 - w) * i + w * (i + 1), np.float64)


# ------------------------------------------------------------------------------------------------------------ grids


@dataclass(frozen=True, eq=False)
class Grid:
    """The points of a run from noise to data: x = alpha·x0 + sigma·ε at each of n timesteps, and at the end."""

    t: Floats  # (n,)
    alpha: Floats  # (n + 1,)
    sigma: Floats  # (n + 1,)
    start: float = 1.0  # the noise's weight in a run from pure noise
    unit_input: bool = False  # whether the network sees x scaled to unit variance
    mix: Grid | None = None  # whose alpha and sigma an image is noised with, where they are not these
    integers: bool = False  # whether the hub's class keeps its timesteps as integers

    @property
    def lam(self) -> Floats:
        return np.log(self.alpha / self.sigma)

    def mixed(self, i: int) -> tuple[float, float]:
        """The weights of image and noise at step i; past the last one, the image alone."""
        grid = self.mix or self
        return (float(grid.alpha[i]), float(grid.sigma[i])) if i < len(self.t) else (1.0, 0.0)


def discrete_grid(config: SchedulerConfig, t: NDArray[np.int64]) -> Grid:
    """x = √ᾱ x0 + √(1 − ᾱ) ε at whole timesteps, ending in the image."""
    bar = alphas_cumprod(config).astype(np.float64)[t]
    return Grid(t.astype(np.float64), np.append(bar**0.5, 1.0), np.append((1 - bar) ** 0.5, 0.0), integers=True)


def own_timesteps(run: Run) -> NDArray[np.int64] | None:
    """The caller's own whole timesteps, or None."""
    if run.timesteps is None:
        return None
    return given("timesteps", run.timesteps, 0, run.config.num_train_timesteps - 1, integers=True).astype(np.int64)


def distilled_timesteps(run: Run) -> NDArray[np.int64]:
    """Every (T / original_inference_steps)-th timestep is known to the student; the run takes some of those."""
    config, original = run.config, run.config.original_inference_steps
    own = own_timesteps(run)
    if own is not None:
        return own
    if run.steps > original:
        raise steps_error(run.steps, f"{config.kind} has original_inference_steps = {original} at most")
    origin = np.arange(original, 0, -1) * (config.num_train_timesteps // original) - 1
    return np.asarray(origin[np.floor(np.linspace(0, original, run.steps, endpoint=False)).astype(np.int64)])


def pndm_timesteps(config: SchedulerConfig, steps: int) -> tuple[NDArray[np.int64], int]:
    """The timesteps, and how many of them, the first ones, are Runge-Kutta evaluations."""
    t = spaced(config, steps)
    if config.skip_prk_steps:
        return whole(config, np.insert(t, 1, t[1]) if steps > 1 else t), 0
    if steps < 4:
        raise steps_error(steps, "PNDM with Runge-Kutta steps needs at least 4")
    half = config.num_train_timesteps // steps // 2
    prk = [s for k in range(3) for s in (t[k], t[k + 1] + half, t[k + 1] + half, t[k + 1])]
    return whole(config, np.concatenate([prk, t[3:]])), len(prk)


def single(values: Floats) -> Floats:
    """Rounded to float32, in which the hub's classes keep their sigmas: 1 − σ of a flow feels it."""
    return values.astype(np.float32).astype(np.float64)


def sigma_grid(run: Run) -> Grid:
    """x = x0 + σ ε: the samplers of Karras et al., arXiv 2206.00364, on a network trained at discrete timesteps."""
    config, training = run.config, training_sigmas(run.config)
    last = float(training[0]) if config.final_sigmas_type == "sigma_min" else 0.0
    if run.sigmas is not None:
        sigmas = given("sigmas", run.sigmas, 0.0, 1e6)
        if len(sigmas) < 2 or sigmas[-2] <= 0:
            raise ArgumentError("sigmas: must hold a step and its end, which alone may be 0", field="sigmas")
        t = sigma_to_t(sigmas[:-1], training)
    else:
        last_t, own = config.num_train_timesteps - 1, run.timesteps
        t = spaced(config, run.steps) if own is None else given("timesteps", own, 0, last_t)
        t = t if config.kind == "dpm_sde" else single(t)
        sigmas = np.interp(t, np.arange(len(training)), training)
        if config.interpolation_type == "log_linear":
            sigmas = np.exp(np.linspace(np.log(training[-1]), np.log(training[0]), len(t) + 1))
        low = sigmas[-1] if config.sigma_min is None else config.sigma_min
        high = sigmas[0] if config.sigma_max is None else config.sigma_max
        curve = shaped(config, low, high, len(t))
        if curve is not None:
            sigmas, t = curve, sigma_to_t(curve, training)
        sigmas = np.append(sigmas, last)
    if config.timestep_type == "continuous" and config.prediction_type == "v_prediction":
        t = np.log(sigmas[:-1]) / 4
    sigmas, most = single(sigmas), float(sigmas.max())
    start = (most**2 + 1) ** 0.5 if config.timestep_spacing == "leading" else most
    return Grid(t, np.ones_like(sigmas), sigmas, start, unit_input=True)


def edm_grid(run: Run) -> Grid:
    """x = x0 + σ ε: Karras et al., arXiv 2206.00364, for a network that was trained on σ itself."""
    config = run.config
    low, high = float(config.sigma_min or 0.002), float(config.sigma_max or 80.0)
    if config.sigma_schedule == "karras":
        sigmas = karras(low, high, run.steps, config.rho)
    else:
        sigmas = exponential(high, low, run.steps)[::-1]  # one step starts at the low end, as the hub's
    end = 0.0 if config.final_sigmas_type == "zero" else low if config.kind == "edm_dpm_multistep" else sigmas[-1]
    return Grid(np.log(sigmas) / 4, np.ones(len(sigmas) + 1), np.append(sigmas, end), (high**2 + 1) ** 0.5)


def shift_of(run: Run) -> float:
    """The shift of a flow's sigmas: Esser et al., arXiv 2403.03206, equation 23."""
    config = run.config
    if not config.use_dynamic_shifting:
        return config.flow_shift
    if run.mu is None:
        raise ArgumentError("mu: is needed, because the scheduler has use_dynamic_shifting", field="mu")
    return math.exp(run.mu) if config.time_shift_type == "exponential" else run.mu


def shifted(sigmas: Floats, shift: float) -> Floats:
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def stretched(sigmas: Floats, terminal: float | None) -> Floats:
    """The sigmas, scaled about 1 so that the last one is `terminal`."""
    return sigmas if terminal is None else 1 - (1 - sigmas) * (1 - terminal) / (1 - sigmas[-1])


def flow_grid(run: Run) -> Grid:
    """x = (1 − σ) x0 + σ n. The ends were shifted once before the whole is shifted, as the hub's are."""
    config, total, t = run.config, run.config.num_train_timesteps, None
    if run.timesteps is not None:
        t = given("timesteps", run.timesteps, 1e-6 * total, total)
        sigmas = t / total
    elif run.sigmas is not None:
        sigmas = given("sigmas", run.sigmas, 1e-6, 1.0)
    else:
        high, low = shifted(np.array([1.0, 1 / total]), 1.0 if config.use_dynamic_shifting else config.flow_shift)
        sigmas = np.linspace(high, low, run.steps)
    sigmas = stretched(shifted(sigmas, shift_of(run)), config.shift_terminal)
    curve = shaped(config, float(sigmas[-1]), float(sigmas[0]), len(sigmas))
    sigmas = sigmas if curve is None else curve
    t, end = sigmas * total if t is None else t, 0.0
    if config.invert_sigmas:
        sigmas, t, end = 1 - sigmas, (1 - sigmas) * total, 1.0
    sigmas = np.append(sigmas, end)
    return Grid(t, 1 - sigmas, sigmas)


def solver_grid(run: Run) -> Grid:
    """α² + σ² = 1, or α + σ = 1 with `use_flow_sigmas`: the solvers in λ = log(α / σ)."""
    config, steps, total = run.config, run.steps, run.config.num_train_timesteps
    training, flow = training_sigmas(config), config.use_flow_sigmas
    low = float(training[0]) if config.sigma_min is None else config.sigma_min
    high = float(training[-1]) if config.sigma_max is None else config.sigma_max
    sigmas = shaped(config, low, high, steps)
    plain = sigmas is None and not flow
    if run.sigmas is not None and (sigmas is not None or plain):
        raise ArgumentError("sigmas: unipc takes them with use_flow_sigmas alone", field="sigmas")
    if sigmas is not None:
        t = sigma_to_t(sigmas, training)
        cosine = config.kind == "dpm_multistep" and config.beta_schedule == "squaredcos_cap_v2"
        if flow and config.kind == "unipc" and config.use_karras_sigmas:
            sigmas = sigmas / (sigmas + 1)
            t = sigmas * total
        elif (config.use_karras_sigmas or config.use_lu_lambdas) and not cosine:
            t = np.round(t)
    elif flow:
        sigmas = solver_flow_sigmas(run)
        t = sigmas * total
    else:
        own = own_timesteps(run)
        reach = total - int(np.sum(-np.log(training) < config.lambda_min_clipped))
        own = whole(config, spaced(config, steps, last=reach, drop_last=True)) if own is None else own
        t = own.astype(np.float64)
        sigmas = np.interp(t, np.arange(total), training)
    last = 0.0
    if config.kind in ("deis", "sa_solver") or config.final_sigmas_type == "sigma_min":
        stays = config.kind in ("deis", "sa_solver", "unipc") and not plain
        last = float(sigmas[-1] if stays else training[0])
    sigmas, t = single(np.append(sigmas, last)), np.trunc(t)
    alpha = 1 - sigmas if flow else (sigmas**2 + 1) ** -0.5
    mix = discrete_grid(config, t.astype(np.int64)) if config.kind == "sa_solver" else None
    return Grid(t, alpha, sigmas if flow else sigmas * alpha, mix=mix, integers=True)


def solver_flow_sigmas(run: Run) -> Floats:
    """The sigmas of a solver on a flow, without the final one; UniPC starts nearer to pure noise."""
    config, total = run.config, run.config.num_train_timesteps
    if config.kind != "unipc":
        return shifted(1 - np.linspace(1, 1 / total, run.steps + 1), shift_of(run))[:0:-1]
    even = np.linspace(1, 1 / total, run.steps + 1)[:-1]
    sigmas = even if run.sigmas is None else given("sigmas", run.sigmas, 1e-6, 1.0)
    sigmas = stretched(shifted(sigmas, shift_of(run)), config.shift_terminal)
    sigmas[0] = min(sigmas[0], 1 - 1e-6)  # so that λ is finite
    return sigmas
