"""Every sampler as a table: given the network's raw output, all of them update their state linearly.

A function here reads like its paper: `rows.read` gives x0 and ε as linear forms of what there is, and the new state
is written with them. Letters: α, σ with x = α x0 + σ ε; λ = log(α/σ); h a step in λ; i counts the steps of the whole
run, `known` those behind this one: a run that starts in the middle has no history yet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from fastldm.errors import ConfigError
from fastldm.sampling import schedules
from fastldm.sampling.config import FLOW_KINDS, SchedulerConfig
from fastldm.sampling.run import Run
from fastldm.sampling.schedules import Floats, Grid
from fastldm.sampling.table import Brownian, Form, Rows, SamplerTable, combine


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

    eta: the share of noise, for DDIM and TCD. timesteps, sigmas: the caller's own, in place of `steps`; sigmas end
    with the one behind the last step for Euler, and without it for flows, as diffusers takes them.
    mu: the shift of a flow whose configuration says `use_dynamic_shifting`.
    Raises `ArgumentError` naming the argument, `ConfigError` where the configuration's numbers give no finite table.
    """
    run = Run(config, steps, eta, timesteps, sigmas, begin, mu)
    run.check()
    with np.errstate(all="ignore"):
        try:
            return SAMPLERS[config.kind](run)
        except np.linalg.LinAlgError:
            raise ConfigError(f"{config.kind}: two steps have the same sigma", field="num_train_timesteps") from None


# ------------------------------------------------------------------------------- discrete time: x = √ᾱ x0 + √(1−ᾱ) ε


def ddim(run: Run) -> SamplerTable:
    """Song et al., arXiv 2010.02502, equations 12 and 16."""
    config = run.config
    bar = schedules.alphas_cumprod(config).astype(np.float64)
    t = schedules.whole(config, schedules.spaced(config, run.steps))
    grid = schedules.discrete_grid(config, t)
    final = 1.0 if config.set_alpha_to_one else bar[0]
    rows, stride = Rows(config, grid, 1), config.num_train_timesteps // run.steps
    for i in run.first(len(t)):
        now, then = bar[t[i]], bar[t[i] - stride] if t[i] >= stride else final
        x0, eps = rows.read(grid.alpha[i], grid.sigma[i], clip=True)
        std = run.eta * ((1 - then) / (1 - now) * (1 - now / then)) ** 0.5
        x = then**0.5 * x0 + max(1 - then - std**2, 0.0) ** 0.5 * eps + std * rows.noise
        rows.add(i, [x], draws=run.eta > 0)
    return rows.table(run.begin)


def ddpm(run: Run) -> SamplerTable:
    """Ho et al., arXiv 2006.11239, equation 7 between the timesteps that are visited."""
    config, t = run.config, schedules.own_timesteps(run)
    t = schedules.whole(config, schedules.spaced(config, run.steps)) if t is None else t
    grid = schedules.discrete_grid(config, t)
    rows, bar = Rows(config, grid, 1), grid.alpha**2
    for i in run.first(len(t)):
        x0, _ = rows.read(grid.alpha[i], grid.sigma[i], clip=True)
        alpha, beta, rest = bar[i] / bar[i + 1], 1 - bar[i] / bar[i + 1], (1 - bar[i + 1]) / (1 - bar[i])
        x = bar[i + 1] ** 0.5 * beta / (1 - bar[i]) * x0 + alpha**0.5 * rest * rows.x
        std = (beta if config.variance_type == "fixed_large" else max(rest * beta, 1e-20)) ** 0.5
        rows.add(i, [x + std * rows.noise if t[i] > 0 else x], draws=bool(t[i] > 0))
    return rows.table(run.begin)


# Adams and Bashforth, orders 1 to 4: the weights of the newest slope and of the older ones.
ADAMS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def pndm(run: Run) -> SamplerTable:
    """Liu et al., arXiv 2202.09778: equation 11 carries x over, with 4th-order Runge-Kutta or multistep slopes.

    Without Runge-Kutta steps, the second call repeats the first step with the mean of two slopes. A run that starts
    in the middle does the same there, as the hub's class does.
    """
    config = run.config
    bar = schedules.alphas_cumprod(config).astype(np.float64)
    t, prk = schedules.pndm_timesteps(config, run.steps)
    grid, stride = schedules.discrete_grid(config, t), config.num_train_timesteps // run.steps
    rows = Rows(config, grid, 6)
    x, saved, total, *older = rows.state

    def transfer(now: int, then: int, x: Form, e: Form) -> Form:
        a, b = bar[now], bar[then] if then >= 0 else 1.0 if config.set_alpha_to_one else bar[0]
        if config.prediction_type == "v_prediction":
            e = a**0.5 * e + (1 - a) ** 0.5 * x
        return (b / a) ** 0.5 * x - (b - a) * e / (a * (1 - b) ** 0.5 + (a * (1 - a) * b) ** 0.5)

    known = 0
    for call, i in enumerate(run.first(len(t))):
        rows.read(grid.alpha[i], grid.sigma[i])
        base, new_total, slopes = saved, rows.zero, [rows.e, *older]
        if call < prk:
            stage = call % 4
            new_total = (rows.e / 6, total + rows.e / 3, total + rows.e / 3, rows.zero)[stage]
            if stage == 0:
                base, known = x, known + 1
            else:
                slopes = older
            then = t[i] if call % 2 else t[i] - stride // 2
            out = transfer(t[call - stage], then, base, total + rows.e / 6 if stage == 3 else rows.e)
        elif call == 1 and prk == 0:
            slopes = older
            out = transfer(t[i] + stride, t[i], saved, (rows.e + older[0]) / 2)
        else:
            known = min(known + 1, 4)
            base = x if known == 1 else saved
            out = transfer(t[i], t[i] - stride, x, combine(ADAMS[known - 1], slopes))
        rows.add(i, [out, base, new_total, *slopes[:3]], ends=i - run.begin >= len(t) - run.steps)
    return rows.table(run.begin)


def ipndm(run: Run) -> SamplerTable:
    """Zhang & Chen, arXiv 2204.13902, section 4: multistep slopes on x = α x0 + σ ε in trigonometric time."""
    sigma = np.sin(np.linspace(1, 0, run.steps + 1) * math.pi / 2) ** 2
    alpha = np.sqrt(1 - sigma**2)
    grid = Grid(np.arctan2(sigma, alpha)[:-1] / math.pi * 2, alpha, sigma)
    rows = Rows(run.config, grid, 4)
    for known, i in enumerate(run.first(run.steps)):
        slopes = [rows.read(alpha[i], sigma[i])[1], *rows.state[1:]]
        slope = combine(ADAMS[min(known, 3)], slopes)
        x = alpha[i + 1] * (rows.x - sigma[i] * slope) / max(alpha[i], 1e-8) + sigma[i + 1] * slope
        rows.add(i, [x, *slopes[:3]])
    return rows.table(run.begin)


def lcm(run: Run) -> SamplerTable:
    """Luo et al., arXiv 2310.04378, algorithm 3: predict, then add the noise of the next timestep."""
    t = schedules.distilled_timesteps(run)
    grid = schedules.discrete_grid(run.config, t)
    rows = Rows(run.config, grid, 1)
    for i in run.first(len(t)):
        x0, _ = rows.read(grid.alpha[i], grid.sigma[i], clip=True)
        s, data = t[i] * run.config.timestep_scaling, 0.5
        clean = s / (s**2 + data**2) ** 0.5 * x0 + data**2 / (s**2 + data**2) * rows.x
        rows.add(i, [grid.alpha[i + 1] * clean + grid.sigma[i + 1] * rows.noise], draws=i + 1 < len(t))
    return rows.table(run.begin)


def tcd(run: Run) -> SamplerTable:
    """Zheng et al., arXiv 2402.19159, algorithm 4: jump to s = (1 − η) t', then add noise up to t'."""
    bar = schedules.alphas_cumprod(run.config).astype(np.float64)
    t = schedules.distilled_timesteps(run)
    grid = schedules.discrete_grid(run.config, t)
    rows = Rows(run.config, grid, 1)
    for i in run.first(len(t)):
        draws = run.eta > 0 and i + 1 < len(t)
        then = t[i + 1] if i + 1 < len(t) else 0
        s = int(np.float32(1 - run.eta) * np.float32(then))
        x0, eps = rows.read(grid.alpha[i], grid.sigma[i])
        keep = bar[then] / bar[s] if draws else 1.0
        x = keep**0.5 * (bar[s] ** 0.5 * x0 + (1 - bar[s]) ** 0.5 * eps) + (1 - keep) ** 0.5 * rows.noise
        rows.add(i, [x], draws=draws)
    return rows.table(run.begin)


# ------------------------------------------------------------------------- in σ: x = x0 + σ ε, or x = (1 − σ) x0 + σ ε


def grid_of(run: Run) -> Grid:
    """The points of a sampler that goes along σ."""
    if run.config.kind in FLOW_KINDS:
        return schedules.flow_grid(run)
    return schedules.edm_grid(run) if run.config.kind == "edm_euler" else schedules.sigma_grid(run)


def slope_at(rows: Rows, i: int) -> Form:
    """dx/dσ at point i: (x − x0)/σ, which for a flow is the network's output. arXiv 2206.00364, equation 3."""
    alpha, sigma = rows.grid.alpha[i], rows.grid.sigma[i]
    x0, _ = rows.read(alpha, sigma, clip=True)
    return rows.e if rows.config.kind in FLOW_KINDS else (rows.x - x0) / sigma


def ancestral(now: float, then: float) -> tuple[float, float]:
    """(σ_down, σ_up): how far to go without noise, and how much to add, to arrive at `then`."""
    down = then**2 / now
    return down, (then**2 - down**2) ** 0.5


def euler(run: Run) -> SamplerTable:
    """Karras et al., arXiv 2206.00364, algorithm 2 without churn; of EDM networks and flows, too.

    euler_ancestral goes down further and adds the noise that is missing: Song et al., arXiv 2011.13456, appendix F.
    A stochastic flow goes to x0 and back to the next noise level.
    """
    config, grid = run.config, grid_of(run)
    rows, noisy = Rows(config, grid, 1), config.kind == "euler_ancestral" or config.stochastic_sampling
    for i in run.first(len(grid.t)):
        now, then = grid.sigma[i], grid.sigma[i + 1]
        down, up = ancestral(now, then) if config.kind == "euler_ancestral" else (then, 0.0)
        x = rows.x + (down - now) * slope_at(rows, i) + up * rows.noise
        if config.stochastic_sampling:
            x = (1 - then) * rows.x0 + then * rows.noise
        rows.add(i, [x], draws=noisy)
    return rows.table(run.begin)


def heun(run: Run) -> SamplerTable:
    """Karras et al., arXiv 2206.00364, algorithm 1: Euler, then again with the mean of both ends' slopes."""
    grid = grid_of(run)
    rows = Rows(run.config, grid, 3)
    x, saved, slope = rows.state
    for i in run.first(len(grid.t)):
        step, last = grid.sigma[i + 1] - grid.sigma[i], i + 1 == len(grid.t)
        first = slope_at(rows, i)
        rows.add(i, [x + step * first, x, first], ends=last)
        if not last:
            second = slope_at(rows, i + 1)
            rows.add(i, [saved + step * (slope + second) / 2], t=grid.t[i + 1])
    return rows.table(run.begin)


def dpm2(run: Run) -> SamplerTable:
    """DPM-Solver-2, Lu et al., arXiv 2206.00927, algorithm 1: the slope in the middle of log σ.

    dpm2_ancestral goes down to σ_down < σ' and adds the noise that is missing.
    """
    config, grid = run.config, grid_of(run)
    rows, training = Rows(config, grid, 2), schedules.training_sigmas(config)
    times = np.round(grid.t) if config.use_karras_sigmas else grid.t
    x, saved = rows.state
    for i in run.first(len(grid.t)):
        now, then, last = grid.sigma[i], grid.sigma[i + 1], i + 1 == len(grid.t)
        down, up = ancestral(now, then) if config.kind == "dpm2_ancestral" else (then, 0.0)
        middle = (now * down) ** 0.5
        rows.add(i, [x + (middle - now) * slope_at(rows, i), x], t=times[i], ends=last)
        if not last:
            x0, _ = rows.read(1.0, middle)
            new = saved + (down - now) * (x - x0) / middle + up * rows.noise
            half = schedules.sigma_to_t(np.array([middle]), training)[0]
            rows.add(i, [new], t=half, draws=config.kind == "dpm2_ancestral")
    return rows.table(run.begin)


def dpm_sde(run: Run) -> SamplerTable:
    """SDE-DPM-Solver++ with two calls a step, Lu et al., arXiv 2211.01095, over a midpoint in log σ.

    The noise of both rows is the increment of one Brownian motion over σ, which is what `Brownian` says.
    """
    grid, spans = grid_of(run), []
    rows, training = Rows(run.config, grid, 2), schedules.training_sigmas(run.config)
    x, saved = rows.state
    for i in run.first(len(grid.t)):
        now, then, last = grid.sigma[i], grid.sigma[i + 1], i + 1 == len(grid.t)
        middle = (now * then) ** 0.5
        for base, sigma, to in ((x, now, middle), (saved, middle, then))[: 1 if last else 2]:
            x0, _ = rows.read(1.0, sigma)
            down, up = ancestral(now, to)
            half = schedules.sigma_to_t(np.array([sigma]), training)[0]
            new = x0 + down / now * (base - x0) + up * rows.noise
            rows.add(i, [new, x], t=grid.t[i] if sigma == now else half, ends=last or sigma == middle)
            spans.append((0.0, 0.0) if last else (now, then))
    ends, halfway = (float(grid.sigma[-2]), float(grid.sigma[0])), np.arange(len(spans)) % 2 == 0
    return rows.table(run.begin, Brownian(np.array(spans), halfway, *ends, run.config.noise_sampler_seed))


def lagrange(nodes: Sequence[float] | Floats, k: int) -> Floats:
    """Coefficients, highest power first, of the polynomial that is 1 at nodes[k] and 0 at the others."""
    others = [n for j, n in enumerate(nodes) if j != k]
    return np.atleast_1d(np.poly(others)) / math.prod(nodes[k] - n for n in others)


def lms(run: Run) -> SamplerTable:
    """Linear multistep of order 4 in σ: the polynomial through the slopes, integrated. Hairer et al., 1993, III.5.

    A run that starts in the middle takes the weights of the whole run's order and leaves out the slopes that it does
    not have, as the hub's class does.
    """
    grid = grid_of(run)
    rows = Rows(run.config, grid, 4)
    for known, i in enumerate(run.first(len(grid.t))):
        slopes = [slope_at(rows, i), *rows.state[1:]]
        past = grid.sigma[i - min(i, 3) : i + 1][::-1] - grid.sigma[i]
        step = grid.sigma[i + 1] - grid.sigma[i]
        areas = [np.polyval(np.polyint(lagrange(past, k)), step) for k in range(len(past))][: known + 1]
        rows.add(i, [rows.x + combine(areas, slopes), *slopes[:3]])
    return rows.table(run.begin)


# ---------------------------------------------------------------------------- exponential integrators in λ = log(α/σ)


def phi(z: float) -> list[float]:
    """e^z − 1, and what is left of it after one and two terms: (e^z − 1)/z − 1, ((e^z − 1)/z − 1)/z − 1/2."""
    if abs(z) < 1e-3:
        return [math.expm1(z), z / 2 + z**2 / 6 + z**3 / 24, z / 6 + z**2 / 24 + z**3 / 120]
    e = float(np.expm1(z))
    return [e, e / z - 1, (e / z - 1) / z - 0.5]


def exponential_step(rows: Rows, i: int, j: int, x: Form, d: Sequence[Form]) -> Form:
    """x from point i to j of the grid, with d = x0 or ε at i and its derivatives in λ, times h and h².

    DPM-Solver: Lu et al., arXiv 2206.00927, equation 3.4; DPM-Solver++ and the SDE forms: arXiv 2211.01095,
    equations 8 and 18. solver_type heun has the exact weights, midpoint half the first one in place of the second.
    """
    config, grid = rows.config, rows.grid
    sde, data = config.algorithm_type.startswith("sde"), config.algorithm_type.endswith("++")
    alpha, sigma, h = grid.alpha, grid.sigma, grid.lam[j] - grid.lam[i]
    weights = phi(h if not data else -2 * h if sde else -h)
    if len(d) == 2 and config.solver_type == "midpoint":
        weights[1] = weights[0] / 2
    if sde and data:
        weights[2] += 1  # the hub's third order has this, the expansion has not
    change = combine(weights, d)
    if data:
        fade, spread = (np.exp(-h), max(-np.expm1(-2 * h), 0.0) ** 0.5) if sde else (1.0, 0.0)
        return np.asarray(sigma[j] / sigma[i] * fade * x - alpha[j] * change + sigma[j] * spread * rows.noise)
    factor, spread = (2.0, max(np.expm1(2 * h), 0.0) ** 0.5) if sde else (1.0, 0.0)
    return np.asarray(alpha[j] / alpha[i] * x - factor * sigma[j] * change + sigma[j] * spread * rows.noise)


def dpm_multistep(run: Run) -> SamplerTable:
    """DPM-Solver and DPM-Solver++ with derivatives from earlier steps: Lu et al., arXiv 2211.01095, algorithm 2.

    The third order takes half the second derivative, as the authors' code and the hub's do; its order is 2.
    """
    config = run.config
    grid = schedules.edm_grid(run) if config.kind == "edm_dpm_multistep" else schedules.solver_grid(run)
    n, lam = len(grid.t), grid.lam
    rows, few = Rows(config, grid, config.solver_order), n < 15 and config.lower_order_final
    for known, i in enumerate(run.first(n)):
        x0, eps = rows.read(grid.alpha[i], grid.sigma[i])
        m = [x0 if config.algorithm_type.endswith("++") else eps, *rows.state[1:]]
        order = min(config.solver_order, known + 1, 2 if few and i == n - 2 else 3)
        if i == n - 1 and (few or config.euler_at_final or config.final_sigmas_type == "zero"):
            order = 1
        h, *past = (lam[k + 1] - lam[k] for k in range(i, i - order, -1))
        d = [m[0]]
        if order > 1:
            d.append(h / past[0] * (m[0] - m[1]))
        if order > 2:
            second = h / sum(past) * (d[1] - h / past[1] * (m[1] - m[2]))
            d = [m[0], d[1] + past[0] / h * second if h else d[1], second]
        x = exponential_step(rows, i, i + 1, rows.x, d)
        rows.add(i, [x, *m[: config.solver_order - 1]], draws=config.algorithm_type.startswith("sde"))
    return rows.table(run.begin)


def singlestep_orders(config: SchedulerConfig, steps: int) -> list[int]:
    """The order of each step: cycles of 1, 2, .., order, cut at the end."""
    order, zero = config.solver_order, config.final_sigmas_type == "zero"
    orders = (list(range(1, order + 1)) * (steps // order + 1))[:steps]
    if (config.lower_order_final or zero) and steps % order == 0:
        orders[-1] = 1
    return [*orders[:-1], 1] if zero else orders


def dpm_singlestep(run: Run) -> SamplerTable:
    """DPM-Solver and DPM-Solver++ within steps: Lu et al., arXiv 2206.00927, algorithms 1-2; 2211.01095, algorithm 1.

    A step of order k goes again from where the last k − 1 steps began.
    """
    config, grid = run.config, schedules.solver_grid(run)
    lam, orders = grid.lam, singlestep_orders(config, len(grid.t))
    rows = Rows(config, grid, config.solver_order + 1)
    x, saved, *past = rows.state
    for known, i in enumerate(run.first(len(grid.t))):
        x0, eps = rows.read(grid.alpha[i], grid.sigma[i])
        m = [x0 if config.algorithm_type.endswith("++") else eps, *past]
        order = min(orders[i], known + 1)
        first, base = i - order + 1, x if order == 1 else saved
        r = [(lam[k] - lam[first]) / (lam[i + 1] - lam[first]) for k in range(i, first, -1)]
        chords = [(m[k] - m[order - 1]) / r[k] for k in range(order - 1)]
        d = [m[order - 1], *chords[:1]]
        if order == 3 and config.solver_type == "midpoint":
            d.append(rows.zero)
        elif order == 3:
            spread = r[0] - r[1]
            d[1:] = [combine([-r[1] / spread, r[0] / spread], chords), combine([2 / spread, -2 / spread], chords)]
        x_next = exponential_step(rows, first, i + 1, base, d)
        state = [x_next, base, *m[: config.solver_order - 1]]
        rows.add(i, state, draws=config.algorithm_type.startswith("sde"))
    return rows.table(run.begin)


def bh_update(rows: Rows, i: int, order: int, x: Form, m: Sequence[Form], new: Form | None) -> Form:
    """From point i to i + 1 with m[k] = x0 or ε at i − k; with `new`, at i + 1, it is the corrector.

    UniP and UniC: Zhao et al., arXiv 2302.04867, equations 3 and 8; B(h) is h (bh1) or e^h − 1 (bh2).
    """
    config, grid = rows.config, rows.grid
    alpha, sigma, lam = grid.alpha, grid.sigma, grid.lam
    h = lam[i + 1] - lam[i]
    z = -h if config.predict_x0 else h
    e = np.expm1(z)
    scale = z if config.solver_type == "bh1" else e
    r = [(lam[i - k] - lam[i]) / h for k in range(1, order)]
    d = [(m[k] - m[0]) / r[k - 1] for k in range(1, order)]
    if new is not None:
        r, d = [*r, 1.0], [*d, new - m[0]]
    change = e * m[0]
    if d:
        left, b = e / z - 1, []
        for k in range(1, len(d) + 1):
            b.append(left * math.factorial(k) / scale)
            left = left / z - 1 / math.factorial(k + 1)
        powers = np.array([[s**k for s in r] for k in range(len(d))])
        rho = [0.5] if len(d) == 1 else np.linalg.solve(powers, np.array(b))  # one half keeps the order
        change = change + scale * combine(rho, d)
    if config.predict_x0:
        return np.asarray(sigma[i + 1] / sigma[i] * x - alpha[i + 1] * change)
    return np.asarray(alpha[i + 1] / alpha[i] * x - sigma[i + 1] * change)


def unipc(run: Run) -> SamplerTable:
    """Zhao et al., arXiv 2302.04867, algorithms 5-8: each call of the network first corrects the step before."""
    config, grid = run.config, schedules.solver_grid(run)
    rows, order = Rows(config, grid, 2 + config.solver_order), 1
    corrected, last, *past = rows.state
    for known, i in enumerate(run.first(len(grid.t))):
        x0, eps = rows.read(grid.alpha[i], grid.sigma[i])
        m, corrected = x0 if config.predict_x0 else eps, rows.x
        if known and i - 1 not in config.disable_corrector:
            corrected = bh_update(rows, i - 1, order, last, past, m)
        left = len(grid.t) - i if config.lower_order_final else config.solver_order
        order = min(config.solver_order, left, known + 1)
        x = bh_update(rows, i, order, corrected, [m, *past], None)
        rows.add(i, [x, corrected, m, *past[:-1]])
    return rows.table(run.begin)


def exponential_area(polynomial: Floats, rate: float, low: float, high: float) -> float:
    """∫ polynomial(v) e^(rate v) dv from low to high, by parts."""
    ends = np.array([low, high])
    total, derivative, sign = np.zeros(2), np.poly1d(polynomial), 1.0
    for _ in range(len(polynomial)):
        total = total + sign * derivative(ends)
        derivative, sign = derivative.deriv() / rate, -sign
    return float(np.diff(total * np.exp(rate * ends))[0] / rate)


def deis(run: Run) -> SamplerTable:
    """Zhang & Chen, arXiv 2204.13902, equation 15: the polynomial through earlier ε, in log ρ, integrated over ρ."""
    config, grid = run.config, schedules.solver_grid(run)
    n, lam = len(grid.t), grid.lam
    rows, few = Rows(config, grid, config.solver_order), n < 15 and config.lower_order_final
    for known, i in enumerate(run.first(n)):
        m = [rows.read(grid.alpha[i], grid.sigma[i])[1], *rows.state[1:]]
        order = min(config.solver_order, known + 1, n - i if few else 3)
        log_rho = lam[i] - lam[i - order + 1 : i + 1][::-1]
        areas = [exponential_area(lagrange(log_rho, k), 1.0, 0.0, lam[i] - lam[i + 1]) for k in range(order)]
        x = grid.alpha[i + 1] / grid.alpha[i] * (rows.x + grid.sigma[i] * combine(areas, m))
        rows.add(i, [x, *m[: config.solver_order - 1]])
    return rows.table(run.begin)


def stochastic_adams(rows: Rows, i: int, top: int, x: Form, m: Sequence[Form], noise: Form) -> Form:
    """From point i to i + 1 through the values m[k] at points top − k; top = i predicts, i + 1 corrects.

    SA-Solver: Xue et al., arXiv 2309.05019, equations 14 and 17, and the authors' weights for two values. tau, how
    stochastic a step is, is the hub's: fully in the middle of the schedule, elsewhere not at all.
    """
    config, grid = rows.config, rows.grid
    alpha, sigma, lam, tau = grid.alpha, grid.sigma, grid.lam, 1.0 if 200 <= grid.t[i] <= 800 else 0.0
    h, rate = lam[i + 1] - lam[i], 1 + tau**2
    points = lam[top - len(m) + 1 : top + 1][::-1] - lam[i + 1]
    if config.algorithm_type == "noise_prediction":
        areas = [exponential_area(lagrange(points, k), -1.0, -h, 0.0) for k in range(len(m))]
        spread = tau * max(np.expm1(2 * h), 0.0) ** 0.5
        x = alpha[i + 1] / alpha[i] * x - rate * sigma[i + 1] * combine(areas, m)
    else:
        areas = [exponential_area(lagrange(points, k), rate, -h, 0.0) for k in range(len(m))]
        if len(m) == 2:
            shift = (h**2 / 2 - (h * rate + np.expm1(-rate * h)) / rate**2) / (points[0] - points[1])
            areas = [areas[0] + shift, areas[1] - shift]
        spread = max(-np.expm1(-2 * tau**2 * h), 0.0) ** 0.5
        x = np.exp(-(tau**2) * h) * sigma[i + 1] / sigma[i] * x + rate * alpha[i + 1] * combine(areas, m)
    return np.asarray(x + sigma[i + 1] * spread * noise)


def sa_solver(run: Run) -> SamplerTable:
    """Xue et al., arXiv 2309.05019, algorithm 1: each call of the network first corrects the step before."""
    config, grid = run.config, schedules.solver_grid(run)
    most, correct = max(config.predictor_order, config.corrector_order - 1), 0
    rows = Rows(config, grid, 3 + most)
    corrected, last, last_noise, *past = rows.state
    for known, i in enumerate(run.first(len(grid.t))):
        x0, eps = rows.read(grid.alpha[i], grid.sigma[i])
        m, corrected = [x0 if config.algorithm_type == "data_prediction" else eps, *past], rows.x
        if known:
            corrected = stochastic_adams(rows, i - 1, i, last, m[:correct], last_noise)
        left = len(grid.t) - i if config.lower_order_final else most + 1
        order = min(config.predictor_order, left, known + 1)
        correct = min(config.corrector_order, left + 1, known + 2)
        x = stochastic_adams(rows, i, i, corrected, m[:order], rows.noise)
        rows.add(i, [x, corrected, rows.noise, *m[:-1]], draws=True)
    return rows.table(run.begin)


SAMPLERS: dict[str, Callable[[Run], SamplerTable]] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "pndm": pndm,
    "ipndm": ipndm,
    "lcm": lcm,
    "tcd": tcd,
    "euler": euler,
    "euler_ancestral": euler,
    "edm_euler": euler,
    "flow_euler": euler,
    "heun": heun,
    "flow_heun": heun,
    "dpm2": dpm2,
    "dpm2_ancestral": dpm2,
    "dpm_sde": dpm_sde,
    "lms": lms,
    "dpm_multistep": dpm_multistep,
    "edm_dpm_multistep": dpm_multistep,
    "dpm_singlestep": dpm_singlestep,
    "unipc": unipc,
    "deis": deis,
    "sa_solver": sa_solver,
}
