"""The noise schedule: how much of the picture and how much noise there is at each time step.

z_t = α_t z_0 + σ_t ε with α_t² + σ_t² = 1 (Ho et al. 2020, eq. 4; Kingma et al. 2021, section 2.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from sdbatch.errors import ModelError

_KNOWN = {
    "beta_schedule": ("scaled_linear", "linear"),
    "prediction_type": ("epsilon", "v_prediction"),
    "timestep_spacing": ("leading", "trailing", "linspace", None),
}


@dataclass(frozen=True)
class NoiseSchedule:
    """The forward process of a model, as its scheduler config describes it. Defaults: SD 1.x."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"  # or "linear"
    prediction_type: str = "epsilon"  # or "v_prediction"
    rescale_betas_zero_snr: bool = False
    timestep_spacing: str | None = None  # "leading" | "trailing" | "linspace"; None: the sampler's habit
    steps_offset: int = 0
    set_alpha_to_one: bool = True  # does DDIM's last step end at t = "before 0" or at t = 0
    use_karras_sigmas: bool = False  # noise levels spread as in Karras et al. 2022, for samplers that go by them
    use_exponential_sigmas: bool = False  # or evenly in the logarithm

    def __post_init__(self) -> None:
        for field, known in _KNOWN.items():
            if (value := getattr(self, field)) not in known:
                raise ModelError(f"scheduler: {field} '{value}' is not known (use {' or '.join(map(repr, known))})")

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """ᾱ_t = α_t² for every training time step, float32 (num_train_timesteps,)."""
        steps = self.num_train_timesteps
        if self.beta_schedule == "scaled_linear":
            betas = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, steps, dtype=torch.float32) ** 2
        else:
            betas = torch.linspace(self.beta_start, self.beta_end, steps, dtype=torch.float32)
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        return _zero_terminal_snr(alphas_cumprod) if self.rescale_betas_zero_snr else alphas_cumprod

    @cached_property
    def trained_levels(self) -> np.ndarray:
        """The noise level σ/α of every trained time step, float64. A pure-noise end gets a large finite level."""
        alphas_cumprod = self.alphas_cumprod.double().numpy().copy()
        alphas_cumprod[-1] = max(alphas_cumprod[-1], 2.0**-24)
        levels: np.ndarray = np.sqrt((1 - alphas_cumprod) / alphas_cumprod)
        return levels

    def time_of(self, level: np.ndarray | float) -> np.ndarray:
        """The (fractional) time step of a noise level, interpolated in its logarithm."""
        times = np.arange(self.num_train_timesteps, dtype=np.float64)
        return np.interp(np.log(level), np.log(self.trained_levels), times)

    def add_noise(self, z0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Draw from q(z_t | z_0): latents and noise (B, C, h, w), timesteps (B,) int64."""
        alpha, sigma = self._signal_and_noise(timesteps, z0)
        return alpha * z0 + sigma * noise

    def target(self, z0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network is trained to say: ε, or v = α ε - σ z_0 (Salimans & Ho 2022, section 4)."""
        if self.prediction_type == "epsilon":
            return noise
        alpha, sigma = self._signal_and_noise(timesteps, z0)
        return alpha * noise - sigma * z0

    def split(self, output: Tensor, z: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        """Turn the network's output at z = α z_0 + σ ε into its estimates of z_0 and ε."""
        if self.prediction_type == "epsilon":
            return (z - sigma * output) / alpha, output
        return alpha * z - sigma * output, sigma * z + alpha * output

    def _signal_and_noise(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        alphas_cumprod = self.alphas_cumprod.to(like.device)[timesteps][:, None, None, None]
        return alphas_cumprod.sqrt().to(like.dtype), (1 - alphas_cumprod).sqrt().to(like.dtype)


def _zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale √ᾱ so that the last step is pure noise (Lin et al. 2024, algorithm 1)."""
    root = alphas_cumprod.sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    # Through the betas and back, as the reference does: the same rounding, the same tables.
    squares = root**2
    alphas = torch.cat([squares[:1], squares[1:] / squares[:-1]])
    return torch.cumprod(1 - (1 - alphas), dim=0)
