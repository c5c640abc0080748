"""Stage one: the VAE learns to carry pictures through its latents (Rombach et al. 2022, section 3.1)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdbatch.diffusion.vae import VAE
from sdbatch.training.loop import Report, autocast, parallel, train
from sdbatch.training.recipe import Recipe
from sdbatch.training.world import PIXELS, draw, random_scene

KL_WEIGHT = 3e-3


class Reconstruction(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] and noise for the latents → the loss of their reconstruction."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        mean, log_variance = self.vae.encode(images)
        drawn = self.vae.decode(mean + torch.exp(0.5 * log_variance) * noise)
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).float().mean()
        # Edges count: the differences between neighbours must come out right too.
        edges = sum(F.l1_loss(drawn.diff(dim=d).float(), images.diff(dim=d)) for d in (2, 3))
        return F.l1_loss(drawn.float(), images) + 2 * F.mse_loss(drawn.float(), images) + 0.5 * edges + KL_WEIGHT * kl


def picture_batch(rng: np.random.Generator, count: int) -> Tensor:
    """Fresh pictures of the world (count, 3, PIXELS, PIXELS) in [-1, 1]."""
    return as_tensor(np.stack([draw(random_scene(rng))[0] for _ in range(count)]))


def as_tensor(pictures: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 → (B, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vae(vae: VAE, recipe: Recipe, folder: Path, report: Report) -> None:
    """Train the VAE in place on pictures that are drawn as they are needed, each seen once."""
    objective = parallel(Reconstruction(vae))
    size = PIXELS // vae.config.downscale

    def loss(rng: np.random.Generator) -> Tensor:
        images = picture_batch(rng, recipe.vae_batch).to(recipe.device)
        noise = rng.standard_normal((recipe.vae_batch, vae.config.latent_channels, size, size), dtype=np.float32)
        with autocast(recipe.device, recipe.mixed_precision):
            value: Tensor = objective(images, torch.from_numpy(noise).to(recipe.device))
        return value

    train(objective, loss, recipe.vae_plan, folder, report)


@torch.no_grad()
def normalise_latents(vae: VAE, latents: Tensor) -> Tensor:
    """Fold each channel's mean and spread into the 1×1 convolutions, so that latents come out standardised.

    ``latents`` (N, C, h, w) are means of the VAE as it stands; returns them as it makes them from now on. No file
    format and no pipeline needs to know of it then.
    """
    mean, spread = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    channels = len(mean)
    inner, outer = vae.quant_conv, vae.post_quant_conv
    inner.weight[:channels] /= spread[:, None, None, None]
    inner.bias[:channels] = (inner.bias[:channels] - mean) / spread  # type: ignore[index]
    inner.bias[channels:] -= 2 * spread.log()  # type: ignore[index]  # the log-variances of the scaled latents
    outer.bias += outer.weight[:, :, 0, 0] @ mean  # type: ignore[operator]
    outer.weight *= spread[None, :, None, None]
    return (latents - mean[None, :, None, None]) / spread[None, :, None, None]
