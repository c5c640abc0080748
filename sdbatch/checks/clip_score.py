"""The CLIP score: how well a picture fits its prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from sdbatch.diffusion.clip import CLIP
from sdbatch.diffusion.prompt import parse_emphasis

#: Prompts whose vectors are kept: several pictures of a prompt, and several candidates of a picture, come in a row.
_KEPT = 256


class Scorer:
    """Scores pictures by a CLIP. ``emphasis``: brackets in prompts are weights, which CLIP knows nothing of."""

    def __init__(self, clip: CLIP, emphasis: bool) -> None:
        self._clip, self._emphasis = clip, emphasis
        self._vector = lru_cache(_KEPT)(self._read)

    def __call__(self, pixels: np.ndarray, prompts: Sequence[str | None]) -> list[float | None]:
        """Cosines, to four digits, of pictures (B, H, W, 3) uint8 and their prompts, None for one that is no number.

        A score depends on its picture, its prompt, its place and B alone. The prompt of an empty slot is None.
        """
        images = self._clip.embed_images(pixels)
        texts = torch.stack([self._vector(prompt or "") for prompt in prompts])
        cosines: list[float] = (images * texts).sum(dim=-1).tolist()
        return [round(cosine, 4) if math.isfinite(cosine) else None for cosine in cosines]

    def _read(self, prompt: str) -> Tensor:
        """The prompt's vector, read by itself: which others are new depends on neighbours."""
        text = "".join(part for part, _ in parse_emphasis(prompt)) if self._emphasis else prompt
        return self._clip.embed_texts([text])[0]
