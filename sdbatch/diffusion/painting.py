"""Pictures that are known beforehand, in whole or in part."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sdbatch.diffusion.grids import Step
from sdbatch.errors import UsageError


@dataclass(frozen=True)
class Painting:
    """What is known of the pictures beforehand: nothing, all but a region, or what an inpainting model is shown."""

    mask: Tensor | None = None  # (B, 1, h, w), 1 where to paint
    known: Tensor | None = None  # (B, C, h, w) latents of the given pictures
    noise: Tensor | None = None  # (B, C, h, w) that takes them to any noise level
    beside: Tensor | None = None  # (B, 5, h, w) mask and masked picture, channels of their own

    def shown(self, z: Tensor, step: Step, *, first: bool) -> Tensor:
        """What the network sees of z at the beginning of a step."""
        if self.beside is not None:
            return torch.cat([z, self.beside], dim=1)
        if self.mask is None or self.known is None or self.noise is None or first:
            return z
        there = step.alpha * self.known + step.sigma * self.noise
        return self.mask * z + (1 - self.mask) * there

    def finished(self, z: Tensor) -> Tensor:
        if self.mask is None or self.known is None:
            return z
        return self.mask * z + (1 - self.mask) * self.known


def checked_pixels(array: np.ndarray, batch: int, size: tuple[int, int], name: str, dims: int) -> Tensor:
    """``array`` as a tensor, if it holds ``batch`` pictures of ``size`` (width, height); else UsageError."""
    wanted = (batch, size[1], size[0], 3)[:dims]
    kind = np.dtype(np.uint8 if dims == 4 else np.bool_)
    if array.shape != wanted or array.dtype != kind:
        raise UsageError(f"generate: {name} is {array.dtype} of shape {array.shape}; use {kind} of shape {wanted}")
    return torch.from_numpy(np.ascontiguousarray(array))
