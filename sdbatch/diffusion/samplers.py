"""Samplers: from noise to a latent by a chain of denoising steps.

Each sampler is a plain function of (denoiser, z, steps, noise). ``denoiser(z, step)`` gives the model's estimates
(z_0, ε) at z = α z_0 + σ ε; ``steps`` says where each step starts and ends; ``noise()`` draws one (C, h, w) of
float32 for every image from that image's own generator. Everything is kept in the variance-preserving form
α² + σ² = 1, in which the literature's samplers differ by a line or two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from sdbatch.diffusion.grids import (
    LCM_STEPS,
    Levels,
    Step,
    ddim_grid,
    ddpm_grid,
    dpmpp_grid,
    euler_grid,
    lcm_grid,
    look_ahead,
    step_between,
)
from sdbatch.diffusion.schedule import NoiseSchedule


@dataclass(frozen=True)
class Denoiser:
    """The network at work: ``network(z, step)`` → ε or v (B, C, h, w), guidance included."""

    network: Callable[[Tensor, Step], Tensor]
    schedule: NoiseSchedule

    def __call__(self, z: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """The model's estimates of z_0 and ε."""
        return self.schedule.split(self.network(z, step), z, step.alpha, step.sigma)


Noise = Callable[[], Tensor]


def ddpm(denoiser: Denoiser, z: Tensor, steps: Sequence[Step], noise: Noise) -> Tensor:
    """Ancestral sampling from the posterior q(z_s | z_t, z_0) (Ho et al. 2020, eq. 6 and 7)."""
    for step in steps:
        z0, _ = denoiser(z, step)
        alpha_ratio = (step.alpha / step.alpha_next) ** 2  # ᾱ_t / ᾱ_s
        variance_t, variance_s = step.sigma**2, step.sigma_next**2
        mean = (step.alpha_next * (1 - alpha_ratio) / variance_t) * z0
        z = mean + (math.sqrt(alpha_ratio) * variance_s / variance_t) * z
        if step.t > 0:
            variance = max(variance_s / variance_t * (1 - alpha_ratio), 1e-20)
            z = z + math.sqrt(variance) * noise()
    return z


def ddim(denoiser: Denoiser, z: Tensor, steps: Sequence[Step], noise: Noise, *, eta: float = 0.0) -> Tensor:
    """Between the deterministic member of the family (η = 0) and DDPM (η = 1) (Song et al. 2021a, eq. 12 and 16).

    In the variance-preserving form Euler's method on the probability-flow ODE (Karras et al. 2022,
    algorithm 1) is this very update; the two differ in the grid of steps alone.
    """
    for step in steps:
        z0, epsilon = denoiser(z, step)
        ratio = (step.alpha * step.sigma_next / (step.alpha_next * step.sigma)) ** 2
        fresh = eta * math.sqrt(max(step.sigma_next**2 / step.sigma**2 - ratio, 0.0)) if eta else 0.0
        z = step.alpha_next * z0 + math.sqrt(max(step.sigma_next**2 - fresh**2, 0.0)) * epsilon
        if eta:
            z = z + fresh * noise()
    return z


def plms(denoiser: Denoiser, z: Tensor, steps: Sequence[Step], noise: Noise) -> Tensor:
    """Pseudo linear multistep: Adams–Bashforth on the network's output (Liu et al. 2022, eq. 12).

    The first step is taken twice, the second time with the mean of the outputs at its two ends.
    """
    past: list[Tensor] = []
    start = z
    for i, step in enumerate(steps):
        output = denoiser.network(z, step)
        if i == 1:
            z, output = start, (past[0] + output) / 2
        else:
            past = [output, *past[:3]]
            weights = _ADAMS_BASHFORTH[len(past)]
            output = sum((weight * term for weight, term in zip(weights, past, strict=True)), start=0.0 * output)
        z0, epsilon = denoiser.schedule.split(output, z, step.alpha, step.sigma)
        z = step.alpha_next * z0 + step.sigma_next * epsilon
    return z


_ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def euler_ancestral(denoiser: Denoiser, z: Tensor, steps: Sequence[Step], noise: Noise) -> Tensor:
    """Euler down to a lower noise level, then fresh noise up to the next."""
    for step in steps:
        z0, epsilon = denoiser(z, step)
        up, down = _ancestral(step.level, step.level_next)
        # Noise is drawn on the last step too, where it weighs nothing: the stream stays the reference's.
        z = step.alpha_next * (z0 + down * epsilon + up * noise())
    return z


def heun(denoiser: Denoiser, z: Tensor, steps: Sequence[Step], noise: Noise) -> Tensor:
    """Heun's method on the probability-flow ODE (Karras et al. 2022, algorithm 1); Euler on the last step."""
    for i, step in enumerate(steps):
        z0, epsilon = denoiser(z, step)
        ahead = step.alpha_next * z0 + step.sigma_next * epsilon
        if i + 1 < len(steps):
            _, epsilon_ahead = denoiser(ahead, steps[i + 1])
            slope = (epsilon + epsilon_ahead) / 2  # dx/d(σ/α) of x = z/α
            ahead = step.alpha_next * (z / step.alpha + (step.level_next - step.level) * slope)
        z = ahead
    return z


def dpmpp_2m(denoiser: Denoiser, z: Tensor, steps: Sequence[Step], noise: Noise, *, stochastic: bool = False) -> Tensor:
    """DPM-Solver++(2M), midpoint form, on the ODE or, ``stochastic``, the SDE (Lu et al. 2022b, appendix B).

    The last step is of first order.
    """
    previous: Tensor | None = None
    h_previous = 0.0
    for i, step in enumerate(steps):
        z0, _ = denoiser(z, step)
        h = _log_snr_gain(step)
        d = z0
        if previous is not None and i < len(steps) - 1:
            d = z0 + (h / (2 * h_previous)) * (z0 - previous)
        shrunk = step.sigma_next / step.sigma
        if stochastic:
            fresh = step.sigma_next * math.sqrt(-math.expm1(-2 * h))
            z = (shrunk * math.exp(-h)) * z - (step.alpha_next * math.expm1(-2 * h)) * d + fresh * noise()
        else:
            z = shrunk * z - (step.alpha_next * math.expm1(-h)) * d
        previous, h_previous = z0, h
    return z


def dpmpp_sde(denoiser: Denoiser, z: Tensor, steps: Sequence[Step], noise: Noise) -> Tensor:
    """DPM-Solver++(S) as an SDE: half a step in log SNR, then the whole step with what was seen there.

    The noise of both is one Brownian path over the noise level, as in Karras et al.'s k-diffusion.
    """
    for step in steps:
        z0, _ = denoiser(z, step)
        if step.sigma_next == 0.0:
            z = step.alpha_next * z0
            continue
        middle = math.sqrt(step.level * step.level_next)
        t_middle = float(denoiser.schedule.time_of(middle))
        first, second = noise(), noise()
        whole = (math.sqrt(step.level - middle) * first + math.sqrt(middle - step.level_next) * second) / math.sqrt(
            step.level - step.level_next
        )
        to_middle, onward = step_between(step.t, step.level, middle), step_between(t_middle, middle, step.level_next)
        halfway = _ancestral_move(z, z0, to_middle, first)
        z0_middle, _ = denoiser(halfway, onward)
        z = _ancestral_move(z, z0_middle, step, whole)
    return z


def unipc(denoiser: Denoiser, z: Tensor, steps: Sequence[Step], noise: Noise) -> Tensor:
    """UniPC of order 2 with B(h) = e^h - 1 on the prediction of z_0 (Zhao et al. 2023, algorithms 1 and 2)."""
    past: list[tuple[Step, Tensor]] = []  # the last two steps and their z_0
    start = z  # z at the beginning of the last step, corrected
    order = 1
    for i, step in enumerate(steps):
        z0, _ = denoiser(z, step)
        if past:  # correct the last step by what is seen at its end
            before, z0_before = past[0]
            h = _log_snr_gain(before)
            b1, b2 = _unipc_coefficients(h)
            residual = 0.5 * (z0 - z0_before)
            if order == 2:
                r = -_log_snr_gain(past[1][0]) / h
                weight = (b1 - b2) / (1 - r)
                residual = weight * (past[1][1] - z0_before) / r + (b1 - weight) * (z0 - z0_before)
            grown = before.alpha_next * math.expm1(-h)
            z = (before.sigma_next / before.sigma) * start - grown * (z0_before + residual)
        order = min(2, i + 1, len(steps) - i)
        h = _log_snr_gain(step)
        d = z0
        if order == 2:
            before, z0_before = past[0]
            d = z0 + 0.5 * (z0_before - z0) / (-_log_snr_gain(before) / h)
        start = z
        past = [(step, z0), *past[:1]]
        z = (step.sigma_next / step.sigma) * z - (step.alpha_next * math.expm1(-h)) * d
    return z


def lcm(denoiser: Denoiser, z: Tensor, steps: Sequence[Step], noise: Noise) -> Tensor:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1; Luo et al. 2023)."""
    for i, step in enumerate(steps):
        z0, _ = denoiser(z, step)
        scaled = 10.0 * step.t  # the boundary condition of the distillation, with its σ_data = 0.5
        denoised = (scaled / math.sqrt(scaled**2 + 0.25)) * z0 + (0.25 / (scaled**2 + 0.25)) * z
        last = i == len(steps) - 1
        z = denoised if last else step.alpha_next * denoised + step.sigma_next * noise()
    return z


def _log_snr_gain(step: Step) -> float:
    """h = λ' - λ with λ = log(α/σ); infinite for a step to no noise at all."""
    if step.sigma_next == 0.0:
        return math.inf
    return math.log(step.level) - math.log(step.level_next)


def _unipc_coefficients(h: float) -> tuple[float, float]:
    """b_1 and b_2 of UniPC's linear system: φ-functions at -h over B(-h) = e^-h - 1."""
    phi_2 = math.expm1(-h) / -h - 1
    phi_3 = phi_2 / -h - 0.5
    return phi_2 / math.expm1(-h), 2 * phi_3 / math.expm1(-h)


def _ancestral(level: float, level_next: float) -> tuple[float, float]:
    """Noise to add and noise level to go down to first, for an ancestral step between two noise levels."""
    up = min(level_next, math.sqrt(level_next**2 * (level**2 - level_next**2) / level**2))
    return up, math.sqrt(level_next**2 - up**2)


def _ancestral_move(z: Tensor, z0: Tensor, step: Step, noise: Tensor) -> Tensor:
    up, down = _ancestral(step.level, step.level_next)
    ratio = down / step.level
    return step.alpha_next * (ratio * z / step.alpha + (1 - ratio) * z0 + up * noise)


Sampler = Callable[..., Tensor]
Grid = Callable[[NoiseSchedule, int, Levels], list[Step]]


@dataclass(frozen=True)
class Method:
    """A sampler and what comes with it."""

    sampler: Sampler
    grid: Grid
    scaled_start: bool = False  # does the start carry the first step's σ instead of 1
    levels: Levels = "timesteps"


_SPREADS: tuple[Levels, ...] = ("karras", "exponential")
_BY_LEVEL = {
    "euler": Method(ddim, euler_grid, scaled_start=True),
    "heun": Method(heun, euler_grid, scaled_start=True),
    "dpmpp_sde": Method(dpmpp_sde, euler_grid, scaled_start=True),
    "dpmpp_2m": Method(dpmpp_2m, dpmpp_grid),
    "dpmpp_2m_sde": Method(partial(dpmpp_2m, stochastic=True), dpmpp_grid),
    "unipc": Method(unipc, dpmpp_grid),
}
#: Every sampler by name; those that go by noise levels can have them spread as ``NAME_karras`` or ``NAME_exponential``.
SAMPLERS: dict[str, Method] = {
    "ddpm": Method(ddpm, ddpm_grid),
    "ddim": Method(ddim, ddim_grid),
    "plms": Method(plms, ddim_grid),
    "euler_ancestral": Method(euler_ancestral, euler_grid, scaled_start=True),
    "lcm": Method(lcm, lcm_grid),
    **_BY_LEVEL,
    **{
        f"{name}_{levels}": Method(method.sampler, method.grid, method.scaled_start, levels)
        for name, method in _BY_LEVEL.items()
        for levels in _SPREADS
    },
}


def most_steps(name: str, schedule: NoiseSchedule) -> int:
    """The most steps that a sampler can take without taking one twice or starting beyond the last trained one."""
    if name == "lcm":
        return LCM_STEPS
    most = schedule.num_train_timesteps
    if SAMPLERS[name].grid is dpmpp_grid:
        most -= 1  # its grid leaves out one of count + 1 time steps
    return most - schedule.steps_offset if schedule.timestep_spacing in {None, "leading"} else most


def steps_of(name: str, schedule: NoiseSchedule, count: int, last: int | None = None) -> list[Step]:
    """The grid of sampler ``name`` for ``count`` steps, or the ``last`` of them."""
    method = SAMPLERS[name]
    levels = method.levels
    if levels == "timesteps" and name in _BY_LEVEL:  # the checkpoint's own habit
        levels = (
            "karras" if schedule.use_karras_sigmas else "exponential" if schedule.use_exponential_sigmas else levels
        )
    steps = method.grid(schedule, count, levels)[-(last or count) :]
    return look_ahead(schedule, steps, count) if name == "plms" else steps


def start_scale(name: str, schedule: NoiseSchedule, steps: Sequence[Step]) -> float:
    """What pure noise is multiplied by to begin with."""
    scaled = SAMPLERS[name].scaled_start and (schedule.timestep_spacing or "linspace") != "leading"
    return steps[0].sigma if scaled else 1.0


def sample(
    name: str, denoiser: Denoiser, z: Tensor, steps: Sequence[Step], noise: Noise, *, eta: float = 0.0
) -> Tensor:
    """Run sampler ``name`` over ``steps`` from ``z`` (B, C, h, w); returns the final latents. ``eta`` is DDIM's."""
    extra = {"eta": eta} if name == "ddim" else {}
    return SAMPLERS[name].sampler(denoiser, z, steps, noise, **extra)
