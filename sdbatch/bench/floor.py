"""The floor: the arithmetic that pictures take, over the most that the device does of it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from sdbatch.diffusion.checkpoint import Checkpoint
from sdbatch.diffusion.unet import Added
from sdbatch.diffusion.weights import DTYPES, skeletons


@dataclass(frozen=True)
class Flops:
    """Floating-point operations, a multiplication and an addition being two, of products and convolutions alone."""

    text: int  # one prompt through all text encoders
    unet: int  # one picture, one step
    decoder: int  # one picture

    def of_picture(self, evaluations: int) -> int:
        """A picture with its prompt; ``evaluations``: how often the U-Net looks at it, guided steps being two."""
        return self.text + self.unet * evaluations + self.decoder


def count_flops(checkpoint: Checkpoint, width: int, height: int) -> Flops:
    """Run the networks on tensors without content, with every text read anew at every step."""
    with skeletons():
        unet, vae, *texts = (part.kind(part.config) for part in checkpoint.components)
    config, length = checkpoint.unet.config, checkpoint.tokenizers[0].max_length
    factor = checkpoint.vae.config.downscale
    with torch.device("meta"), torch.no_grad():
        added = None
        if config.added_dim:
            sizes = config.added_dim // config.added_sizes_dim
            sizes = 5 if checkpoint.aesthetic_score else min(sizes, 6)
            added = Added(torch.empty(1, config.added_dim - sizes * config.added_sizes_dim), torch.empty(1, sizes))
        latent = torch.empty(1, config.in_channels, height // factor, width // factor)
        decoded = latent[:, : checkpoint.vae.config.latent_channels]
        return Flops(
            text=sum(_counted(text, torch.zeros(1, length, dtype=torch.int64)) for text in texts),
            unet=_counted(unet, latent, torch.empty(1), torch.empty(1, length, config.cross_attention_dim), added),
            decoder=_counted(vae.decode, decoded),
        )


def _counted(run: object, *arguments: object) -> int:
    with FlopCounterMode(display=False) as counter:
        run(*arguments)  # type: ignore[operator]
    return counter.get_total_flops()


def peak_flops(device: str, dtype: str, seconds: float = 1.0) -> float:
    """Operations a second in large products of random matrices: the best of as many as fit in ``seconds``."""
    side = 8192 if device == "cuda" else 1536
    left, right = (torch.randn(side, side, device=device).to(DTYPES[dtype]) for _ in range(2))
    best, ends, rounds = float("inf"), time.perf_counter() + seconds, 0
    while rounds < 4 or time.perf_counter() < ends:
        settle(device)
        began = time.perf_counter()
        for _ in range(10 if device == "cuda" else 1):
            left @ right
        settle(device)
        best = min(best, (time.perf_counter() - began) / (10 if device == "cuda" else 1))
        rounds += 1
    return 2 * side**3 / best


def settle(device: str) -> None:
    """Wait until the device has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()
