"""The safety classifier: how far a picture is beyond the threshold of what pictures should not show."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from sdbatch.diffusion.clip import CLIP
from sdbatch.diffusion.safety_checker import SafetyChecker


class Concepts:
    """Concepts in words, which a CLIP compares with pictures: words → the cosine from which on a picture shows them."""

    def __init__(self, clip: CLIP, concepts: Mapping[str, float]) -> None:
        self._clip, self.names = clip, list(concepts)
        self._vectors = torch.cat([clip.embed_texts([words]) for words in concepts])  # (C, D)
        self._thresholds = torch.tensor(list(concepts.values()), device=self._vectors.device)

    def beyond(self, images: np.ndarray) -> Tensor:
        """(B, C) float32, in thousandths: above 0 the picture shows the concept."""
        cosines = self._clip.embed_images(images) @ self._vectors.T
        return (cosines - self._thresholds).round(decimals=3)


class Classifier:
    """Says of pictures which concept they are the furthest beyond, and how far."""

    def __init__(self, model: SafetyChecker | Concepts) -> None:
        self._model = model

    def __call__(self, pixels: np.ndarray) -> list[tuple[float, str]]:
        """Of each picture (B, H, W, 3) uint8 the score, above 0 for an unsafe one, and the concept's name."""
        largest, places = self._model.beyond(pixels).max(dim=1)
        return [
            (round(score, 3), self._model.names[place])
            for score, place in zip(largest.tolist(), places.tolist(), strict=True)
        ]
