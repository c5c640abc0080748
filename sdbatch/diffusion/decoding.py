"""From latents to pixels in memory: at once on the CPU; on a GPU beside what it is told to do next.

There decoding has a stream of its own, so that the next batch's denoising need not wait for it, and so has the copy to
the host, which goes to pinned memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdbatch.diffusion.pipeline import LatentDiffusion, pixels_of

_cuda: Any = torch.cuda  # parts of it have no types


class Drawn:
    """A batch of pictures, there or on its way from the device."""

    def __init__(self, pixels: Tensor, finite: Tensor, arrival: Any = None) -> None:
        self._pixels, self._finite, self._arrival = pixels, finite, arrival

    @property
    def there(self) -> bool:
        """Can nothing go wrong any more, and nobody has to wait?"""
        return self._arrival is None

    def wait(self) -> tuple[np.ndarray, list[bool]]:
        """Pixels (B, H, W, 3) uint8, and which pictures are finite. From any thread; raises what the device did."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._pixels.numpy(), self._finite.tolist()


class Decoder:
    """Decodes for one model."""

    def __init__(self, model: LatentDiffusion) -> None:
        self._model = model
        self._beside = model.device.type == "cuda"
        if self._beside:
            self._decoding, self._copying = _cuda.Stream(model.device), _cuda.Stream(model.device)

    @torch.inference_mode()
    def __call__(self, latents: Tensor) -> Drawn:
        """Decode latents (B, C, h, w)."""
        if not self._beside:
            return Drawn(*self._pictures(latents))
        self._decoding.wait_stream(torch.cuda.current_stream(latents.device))
        latents.record_stream(self._decoding)  # its memory is not used again before this stream is through with it
        with torch.cuda.stream(self._decoding):
            results = self._pictures(latents)
        self._copying.wait_stream(self._decoding)
        with torch.cuda.stream(self._copying):
            there = [torch.empty(result.shape, dtype=result.dtype, pin_memory=True) for result in results]
            for result, copy in zip(results, there, strict=True):
                result.record_stream(self._copying)
                copy.copy_(result, non_blocking=True)
            arrival = _cuda.Event(blocking=True)  # who waits leaves the core to those that encode
            arrival.record(self._copying)
        return Drawn(there[0], there[1], arrival)

    def _pictures(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        drawn = self._model.decode(latents)
        return pixels_of(drawn.nan_to_num()), drawn.isfinite().flatten(1).all(dim=1)
