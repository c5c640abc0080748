"""What packed convolutions bring: a U-Net's look at a batch with them, beside one without, in turns.

    python -m tests.benchmarks.packing [MODEL] [DTYPE] [SIDE] [BATCH] [TURNS]

MODEL is what ``sdbatch bench`` takes, SIDE the pictures' in pixels; the batch is guided, so that the U-Net looks at
twice as many latents. Both have one copy of the weights, and one thread. The first look, which packs, is told apart.
"""

from __future__ import annotations

import os
import statistics
import sys
import time

import torch

from sdbatch.bench.sizes import checkpoint_of, load_subject
from sdbatch.diffusion.convolution import Conv2d, pack_convolutions, packed_bytes
from sdbatch.engine.cluster import ALLOCATOR


def main(name: str, dtype: str, side: int, batch: int, turns: int) -> None:
    torch.set_num_threads(1)
    model = load_subject(checkpoint_of(name), "cpu", dtype)
    convolutions = [module for module in model.unet.modules() if isinstance(module, Conv2d)]
    pack_convolutions(model.unet)
    with torch.inference_mode():
        conditioning = model.encode(["a red circle"] * 2 * batch, size=(side, side))
        conditioning = model.with_keys_values(conditioning)
        latent = side // model.vae.config.downscale
        z = torch.randn(2 * batch, model.unet.config.in_channels, latent, latent)

        def look(packs: bool) -> tuple[float, torch.Tensor]:
            for module in convolutions:
                module.packs = packs
            began = time.perf_counter()
            result = model.denoise(z, 500.0, conditioning)
            return time.perf_counter() - began, result

        (plain, expected), (first, result) = look(False), look(True)
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(turns):
            for packs in (False, True) if turn % 2 else (True, False):
                seconds[packs].append(look(packs)[0])
    ratios = [packed / plain for packed, plain in zip(seconds[True], seconds[False], strict=True)]
    weights = sum(parameter.nbytes for parameter in model.unet.parameters())
    print(
        f"{name}, {dtype}, {side}x{side}, batches of {batch}, {turns} turns: {statistics.median(seconds[False]):.3f} s "
        f"a look, packed {statistics.median(seconds[True]):.3f}, {statistics.median(ratios):.3f} times as long "
        f"({min(ratios):.3f} to {max(ratios):.3f}); the first {plain:.3f} and {first:.3f}; packed are "
        f"{packed_bytes(model.unet) / 1e9:.3f} of {weights / 1e9:.3f} GB; "
        f"{'the same bytes' if torch.equal(result, expected) else f'apart by {(result - expected).abs().max():.1e}'}"
    )


if __name__ == "__main__":
    if os.environ.get("GLIBC_TUNABLES") != ALLOCATOR:  # as an actor has it, from the process's start
        os.execve(
            sys.executable,
            [sys.executable, "-m", __spec__.name, *sys.argv[1:]],
            os.environ | {"GLIBC_TUNABLES": ALLOCATOR},
        )
    given = [*sys.argv[1:], *["builtin:shapes", "float32", "64", "8", "40"][len(sys.argv) - 1 :]]
    main(given[0], given[1], *(int(word) for word in given[2:]))
