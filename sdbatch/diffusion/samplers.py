"""Samplers: from noise to a latent by a chain of denoising steps.

Each sampler is a plain function of (predict, z, steps, noise). ``predict(z, t, alpha, sigma)`` gives the
model's estimates (z_0, ε) at z = α z_0 + σ ε; ``steps`` says where each step starts and ends; ``noise()``
draws one (C, h, w) of float32 for every image from that image's own generator. Everything is kept in the
variance-preserving form α² + σ² = 1, in which the literature's samplers differ by a line or two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from sdbatch.diffusion.schedule import NoiseSchedule


@dataclass(frozen=True)
class Step:
    """One reverse step: from (t, α, σ) to (α', σ')."""

    t: float
    alpha: float
    sigma: float
    alpha_next: float
    sigma_next: float


Predict = Callable[[Tensor, Step], tuple[Tensor, Tensor]]
Noise = Callable[[], Tensor]
Sampler = Callable[[Predict, Tensor, Sequence[Step], Noise], Tensor]


# -- the samplers ----------------------------------------------------------------------------------------


def ddpm(predict: Predict, z: Tensor, steps: Sequence[Step], noise: Noise) -> Tensor:
    """Ancestral sampling from the posterior q(z_s | z_t, z_0) (Ho et al. 2020, eq. 6 and 7)."""
    for step in steps:
        z0, _ = predict(z, step)
        alpha_ratio = (step.alpha / step.alpha_next) ** 2  # ᾱ_t / ᾱ_s
        variance_t, variance_s = step.sigma**2, step.sigma_next**2
        mean = (step.alpha_next * (1 - alpha_ratio) / variance_t) * z0
        mean = mean + (math.sqrt(alpha_ratio) * variance_s / variance_t) * z
        z = mean
        if step.t > 0:
            variance = max(variance_s / variance_t * (1 - alpha_ratio), 1e-20)
            z = z + math.sqrt(variance) * noise()
    return z


def ddim(predict: Predict, z: Tensor, steps: Sequence[Step], noise: Noise) -> Tensor:
    """The deterministic member of the family (Song et al. 2021a, eq. 12 with σ = 0).

    In the variance-preserving form Euler's method on the probability-flow ODE (Karras et al. 2022,
    algorithm 1) is this very update; the two differ in the grid of steps alone.
    """
    for step in steps:
        z0, epsilon = predict(z, step)
        z = step.alpha_next * z0 + step.sigma_next * epsilon
    return z


def euler_ancestral(predict: Predict, z: Tensor, steps: Sequence[Step], noise: Noise) -> Tensor:
    """Euler down to a lower noise level, then fresh noise up to the next (Karras-style σ/α scale)."""
    for step in steps:
        z0, epsilon = predict(z, step)
        level, level_next = step.sigma / step.alpha, step.sigma_next / step.alpha_next
        up = math.sqrt(level_next**2 * (level**2 - level_next**2) / level**2)
        down = math.sqrt(level_next**2 - up**2)
        # Noise is drawn on the last step too, where it weighs nothing: the stream stays the reference's.
        z = step.alpha_next * (z0 + down * epsilon + up * noise())
    return z


def dpmpp_2m(predict: Predict, z: Tensor, steps: Sequence[Step], noise: Noise) -> Tensor:
    """DPM-Solver++(2M), midpoint form (Lu et al. 2022b, algorithm 2); the last step is of first order."""
    previous: Tensor | None = None
    h_previous = 0.0
    for i, step in enumerate(steps):
        z0, _ = predict(z, step)
        last = i == len(steps) - 1
        if step.sigma_next == 0.0:
            z = z0  # h → ∞
        else:
            h = math.log(step.alpha_next / step.sigma_next) - math.log(step.alpha / step.sigma)
            d = z0
            if previous is not None and not last:
                d = z0 + (h / (2 * h_previous)) * (z0 - previous)
            z = (step.sigma_next / step.sigma) * z - (step.alpha_next * math.expm1(-h)) * d
            h_previous = h
        previous = z0
    return z


# -- the grids of steps ----------------------------------------------------------------------------------


def _timesteps(schedule: NoiseSchedule, count: int, spacing: str, *, whole: bool) -> np.ndarray:
    """Descending time steps (count,) float64 (Lin et al. 2024, table 2)."""
    total = schedule.num_train_timesteps
    if spacing == "leading":
        return (np.arange(count) * (total // count))[::-1].astype(np.float64) + schedule.steps_offset
    if spacing == "trailing":
        return np.round(np.arange(total, 0, -total / count))[:count] - 1
    grid = np.linspace(0, total - 1, count)[::-1]
    return np.round(grid) if whole else grid.astype(np.float32).astype(np.float64)


def ddim_steps(schedule: NoiseSchedule, count: int) -> list[Step]:
    """DDIM's grid: whole time steps, each going down by num_train_timesteps // count."""
    alphas_cumprod = schedule.alphas_cumprod.double().numpy()
    final = 1.0 if schedule.set_alpha_to_one else float(alphas_cumprod[0])
    stride = schedule.num_train_timesteps // count
    starts = _timesteps(schedule, count, schedule.timestep_spacing or "leading", whole=True).astype(int)
    ends = [float(alphas_cumprod[t - stride]) if t >= stride else final for t in starts]
    return _steps_between(starts, [float(alphas_cumprod[t]) for t in starts], ends)


def ddpm_steps(schedule: NoiseSchedule, count: int) -> list[Step]:
    """DDPM's grid: whole time steps, each going down to the next, the last to the clean latent."""
    alphas_cumprod = schedule.alphas_cumprod.double().numpy()
    starts = _timesteps(schedule, count, schedule.timestep_spacing or "leading", whole=True).astype(int)
    levels = [float(alphas_cumprod[t]) for t in starts]
    return _steps_between(starts, levels, [*levels[1:], 1.0])


def _steps_between(timesteps: np.ndarray, starts: Sequence[float], ends: Sequence[float]) -> list[Step]:
    """Steps from one ᾱ = α² to another."""
    return [
        Step(float(t), here**0.5, (1 - here) ** 0.5, there**0.5, (1 - there) ** 0.5)
        for t, here, there in zip(timesteps, starts, ends, strict=True)
    ]


def euler_steps(schedule: NoiseSchedule, count: int) -> list[Step]:
    """Euler's grid: possibly fractional time steps, σ/α interpolated between the trained ones, down to 0."""
    timesteps = _timesteps(schedule, count, schedule.timestep_spacing or "linspace", whole=False)
    return _steps_at(timesteps, np.interp(timesteps, *_trained_levels(schedule)))


def dpmpp_steps(schedule: NoiseSchedule, count: int) -> list[Step]:
    """DPM-Solver++'s grid: whole time steps that leave out the last of count + 1, then 0."""
    total = schedule.num_train_timesteps
    spacing = schedule.timestep_spacing or "linspace"
    if spacing == "linspace":
        timesteps: np.ndarray = np.round(np.linspace(0, total - 1, count + 1))[::-1][:-1]
    elif spacing == "leading":
        timesteps = (np.arange(count + 1) * (total // (count + 1)))[::-1][:-1] + float(schedule.steps_offset)
    else:
        timesteps = _timesteps(schedule, count, spacing, whole=True)
    return _steps_at(timesteps, np.interp(timesteps, *_trained_levels(schedule)))


def dpmpp_karras_steps(schedule: NoiseSchedule, count: int) -> list[Step]:
    """Karras et al. 2022, eq. 5 with ρ = 7 over the trained range, each level with its nearest time step."""
    _, levels = _trained_levels(schedule)
    low, high = levels[0] ** (1 / 7), levels[-1] ** (1 / 7)
    chosen = (high + np.linspace(0, 1, count) * (low - high)) ** 7
    timesteps = np.round(np.interp(np.log(chosen), np.log(levels), np.arange(len(levels))))
    return _steps_at(timesteps, chosen)


def _trained_levels(schedule: NoiseSchedule) -> tuple[np.ndarray, np.ndarray]:
    """Every trained time step and its noise level σ/α. A pure-noise end gets the largest finite level."""
    alphas_cumprod = schedule.alphas_cumprod.double().numpy().copy()
    alphas_cumprod[-1] = max(alphas_cumprod[-1], 2.0**-24)
    return np.arange(len(alphas_cumprod)), np.sqrt((1 - alphas_cumprod) / alphas_cumprod)


def _steps_at(timesteps: np.ndarray, levels: np.ndarray) -> list[Step]:
    alphas = [*(1 / np.sqrt(1 + levels**2)), 1.0]
    sigmas = [*(levels / np.sqrt(1 + levels**2)), 0.0]
    return [
        Step(float(t), float(alphas[i]), float(sigmas[i]), float(alphas[i + 1]), float(sigmas[i + 1]))
        for i, t in enumerate(timesteps)
    ]


# name → (sampler, grid, does the start carry the first step's σ instead of 1)
SAMPLERS: dict[str, tuple[Sampler, Callable[[NoiseSchedule, int], list[Step]], bool]] = {
    "ddpm": (ddpm, ddpm_steps, False),
    "ddim": (ddim, ddim_steps, False),
    "euler": (ddim, euler_steps, True),
    "euler_ancestral": (euler_ancestral, euler_steps, True),
    "dpmpp_2m": (dpmpp_2m, dpmpp_steps, False),
    "dpmpp_2m_karras": (dpmpp_2m, dpmpp_karras_steps, False),
}


def sample(name: str, schedule: NoiseSchedule, count: int, predict: Predict, noise: Noise) -> Tensor:
    """Run sampler ``name`` for ``count`` steps from fresh noise; returns the final latents (B, C, h, w)."""
    sampler, grid, scaled_start = SAMPLERS[name]
    steps = grid(schedule, count)
    start = noise()
    if scaled_start and (schedule.timestep_spacing or "linspace") != "leading":
        start = steps[0].sigma * start
    return sampler(predict, start, steps, noise)
