"""What a denoiser learns: to say ε or v of a noisy latent (Ho et al. 2020, eq. 14; Salimans & Ho 2022, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sdbatch.diffusion.pipeline import LatentDiffusion
from sdbatch.diffusion.schedule import NoiseSchedule


class Denoising(nn.Module):
    """What of a model learns: noisy latents (B, C, h, w), time steps (B,) and prompts → ε or v (B, C, h, w)."""

    def __init__(self, model: LatentDiffusion, size: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.text_encoders = nn.ModuleList(model.text_encoders)
        self.unet = model.unet
        self._model = (model,)  # its networks are above; a tuple hides it from torch
        self._size = size  # of the pictures in pixels, which SDXL is told

    def forward(self, z: Tensor, timesteps: Tensor, prompts: Sequence[str]) -> Tensor:
        model = self._model[0]
        conditioning = model.condition(prompts, size=self._size)
        if model.checkpoint.zero_empty_prompt:  # what guidance will be given for a dropped caption
            conditioning = conditioning.blanked(torch.tensor([prompt != "" for prompt in prompts], device=z.device))
        return self.unet(z, timesteps, conditioning.states, conditioning.added)


@dataclass(frozen=True)
class Batch:
    """What a step learns from."""

    latents: Tensor  # (B, C, h, w)
    prompts: Sequence[str]
    weight: Tensor | None = None  # (B, 1, h, w): how much each region counts


class Examples(Protocol):
    """Where a denoiser's batches come from."""

    def batch(self, rng: np.random.Generator, count: int) -> Batch: ...


@dataclass(frozen=True)
class Objective:
    """Which time steps are drawn, and how much their errors count."""

    timestep_exponent: float = 1.0  # below 1 high noise, where the layout is decided, comes up more often
    min_snr_gamma: float | None = None  # bounds how much low noise counts (Hang et al. 2023): 5 is usual

    def loss(self, network: nn.Module, schedule: NoiseSchedule, batch: Batch, rng: np.random.Generator) -> Tensor:
        """The mean squared error of ``network``, a Denoising, as a scalar; the noise comes from ``rng``."""
        z0 = batch.latents
        noise = torch.from_numpy(rng.standard_normal(z0.shape, dtype=np.float32)).to(z0.device)
        timesteps = self.timesteps(rng, len(z0), schedule).to(z0.device)
        output = network(schedule.add_noise(z0, noise, timesteps), timesteps, batch.prompts)
        error = (output.float() - schedule.target(z0, noise, timesteps)) ** 2
        if batch.weight is not None:
            error = error * batch.weight
        if self.min_snr_gamma is not None:
            error = error * _min_snr(schedule, timesteps, self.min_snr_gamma).to(error)[:, None, None, None]
        return error.mean()

    def timesteps(self, rng: np.random.Generator, count: int, schedule: NoiseSchedule) -> Tensor:
        """One time step from each of ``count`` strata, (count,) int64."""
        spread = (np.arange(count) + rng.random(count)) / count
        steps = np.floor(schedule.num_train_timesteps * spread**self.timestep_exponent)
        return torch.from_numpy(np.clip(steps, 0, schedule.num_train_timesteps - 1).astype(np.int64))


def _min_snr(schedule: NoiseSchedule, timesteps: Tensor, gamma: float) -> Tensor:
    """The weight (B,) float64 of each time step: min(SNR, γ) of the error in z_0, turned to that in ε or v."""
    alphas_cumprod = schedule.alphas_cumprod[timesteps.cpu()].double()
    snr = alphas_cumprod / (1 - alphas_cumprod)
    bounded = snr.clamp(max=gamma)
    # At zero SNR the error in ε says nothing of z_0 and weighs nothing; that in v is the error in z_0.
    return bounded / snr.clamp(min=1e-12) if schedule.prediction_type == "epsilon" else bounded / (snr + 1)
