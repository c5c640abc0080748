"""Where samplers take their steps: grids of time steps and noise levels, from the model's noise schedule.

A noise level is σ/α, the σ of Karras et al. 2022. Grids are made on the CPU in float64, once a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sdbatch.diffusion.schedule import NoiseSchedule

#: How noise levels are spread over the steps: as the time steps fall, by Karras et al. 2022, eq. 5, or evenly in log.
Levels = Literal["timesteps", "karras", "exponential"]


@dataclass(frozen=True)
class Step:
    """One reverse step: from (t, α, σ) to (α', σ')."""

    t: float
    alpha: float
    sigma: float
    alpha_next: float
    sigma_next: float

    @property
    def level(self) -> float:
        return self.sigma / self.alpha

    @property
    def level_next(self) -> float:
        return self.sigma_next / self.alpha_next


def step_between(t: float, level: float, level_next: float) -> Step:
    """The step from one noise level to another, in the variance-preserving form α² + σ² = 1."""
    alpha, alpha_next = (1 / (1 + there**2) ** 0.5 for there in (level, level_next))
    return Step(t, alpha, level * alpha, alpha_next, level_next * alpha_next)


def ddim_grid(schedule: NoiseSchedule, count: int, levels: Levels) -> list[Step]:
    """DDIM's grid: whole time steps, each going down by num_train_timesteps // count."""
    alphas_cumprod = schedule.alphas_cumprod.double().numpy()
    final = 1.0 if schedule.set_alpha_to_one else float(alphas_cumprod[0])
    stride = schedule.num_train_timesteps // count
    starts = _timesteps(schedule, count, schedule.timestep_spacing or "leading", whole=True).astype(int)
    ends = [float(alphas_cumprod[t - stride]) if t >= stride else final for t in starts]
    return _steps_between(starts, [float(alphas_cumprod[t]) for t in starts], ends)


def look_ahead(schedule: NoiseSchedule, steps: Sequence[Step], count: int) -> list[Step]:
    """PLMS takes its first step twice: to look ahead, then again with the network at its end."""
    if len(steps) == 1:
        return list(steps)
    alphas_cumprod, stride = schedule.alphas_cumprod.double().numpy(), schedule.num_train_timesteps // count
    end = int(steps[1].t)
    (again,) = _steps_between(np.array([end]), [float(alphas_cumprod[end + stride])], [float(alphas_cumprod[end])])
    return [steps[0], again, *steps[1:]]


def ddpm_grid(schedule: NoiseSchedule, count: int, levels: Levels) -> list[Step]:
    """DDPM's grid: whole time steps, each going down to the next, the last to the clean latent."""
    starts = _timesteps(schedule, count, schedule.timestep_spacing or "leading", whole=True).astype(int)
    return _down_to_next(schedule, starts)


def lcm_grid(schedule: NoiseSchedule, count: int, levels: Levels) -> list[Step]:
    """The grid of a consistency model: a choice of the 50 time steps that it was distilled at."""
    distilled = (np.arange(1, LCM_STEPS + 1) * (schedule.num_train_timesteps // LCM_STEPS) - 1)[::-1]
    chosen = np.floor(np.linspace(0, LCM_STEPS, count, endpoint=False)).astype(int)
    return _down_to_next(schedule, distilled[chosen])


#: Steps that latent consistency models are distilled at, and so the most that they can take (Luo et al. 2023).
LCM_STEPS = 50


def euler_grid(schedule: NoiseSchedule, count: int, levels: Levels) -> list[Step]:
    """Possibly fractional time steps, σ/α interpolated between the trained ones, down to 0."""
    timesteps = _timesteps(schedule, count, schedule.timestep_spacing or "linspace", whole=False)
    chosen = np.interp(timesteps, np.arange(schedule.num_train_timesteps), schedule.trained_levels)
    if levels != "timesteps":
        chosen = _spread(levels, chosen[0], chosen[-1], count)
        timesteps = schedule.time_of(chosen)
    return _steps_at(timesteps, chosen)


def dpmpp_grid(schedule: NoiseSchedule, count: int, levels: Levels) -> list[Step]:
    """DPM-Solver++'s grid: whole time steps that leave out the last of count + 1, then 0."""
    total, trained = schedule.num_train_timesteps, schedule.trained_levels
    spacing = schedule.timestep_spacing or "linspace"
    if levels != "timesteps":
        chosen = _spread(levels, trained[-1], trained[0], count)
        times = schedule.time_of(chosen)
        return _steps_at(np.round(times) if levels == "karras" else np.trunc(times), chosen)
    if spacing == "linspace":
        timesteps: np.ndarray = np.round(np.linspace(0, total - 1, count + 1))[::-1][:-1]
    elif spacing == "leading":
        timesteps = (np.arange(count + 1) * (total // (count + 1)))[::-1][:-1] + float(schedule.steps_offset)
    else:
        timesteps = _timesteps(schedule, count, spacing, whole=True)
    return _steps_at(timesteps, np.interp(timesteps, np.arange(total), trained))


def _timesteps(schedule: NoiseSchedule, count: int, spacing: str, *, whole: bool) -> np.ndarray:
    """Descending time steps (count,) float64 (Lin et al. 2024, table 2)."""
    total = schedule.num_train_timesteps
    if spacing == "leading":
        return (np.arange(count) * (total // count))[::-1].astype(np.float64) + schedule.steps_offset
    if spacing == "trailing":
        return np.round(np.arange(total, 0, -total / count))[:count] - 1
    grid = np.linspace(0, total - 1, count)[::-1]
    return np.round(grid) if whole else grid.astype(np.float32).astype(np.float64)


def _spread(levels: Levels, high: float, low: float, count: int) -> np.ndarray:
    if levels == "karras":
        ends = high ** (1 / 7), low ** (1 / 7)
        return np.linspace(ends[0], ends[1], count) ** 7
    return np.exp(np.linspace(np.log(high), np.log(low), count))


def _down_to_next(schedule: NoiseSchedule, timesteps: np.ndarray) -> list[Step]:
    alphas_cumprod = schedule.alphas_cumprod.double().numpy()
    levels = [float(alphas_cumprod[t]) for t in timesteps]
    return _steps_between(timesteps, levels, [*levels[1:], 1.0])


def _steps_between(timesteps: np.ndarray, starts: Sequence[float], ends: Sequence[float]) -> list[Step]:
    """Steps from one ᾱ = α² to another."""
    return [
        Step(float(t), here**0.5, (1 - here) ** 0.5, there**0.5, (1 - there) ** 0.5)
        for t, here, there in zip(timesteps, starts, ends, strict=True)
    ]


def _steps_at(timesteps: np.ndarray, levels: np.ndarray) -> list[Step]:
    """Steps from each noise level to the next, the last to 0."""
    ends = [*levels[1:], 0.0]
    return [
        step_between(float(t), float(here), float(there))
        for t, here, there in zip(timesteps, levels, ends, strict=True)
    ]
