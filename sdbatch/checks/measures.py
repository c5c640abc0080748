"""What is measured of every picture, beside the model and on its device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sdbatch.checks.blank import contrast
from sdbatch.checks.perceptual_hash import perceptual_hash
from sdbatch.spec import Checks

if TYPE_CHECKING:
    from sdbatch.checks.clip_score import Scorer
    from sdbatch.checks.safety import Classifier


@dataclass(frozen=True)
class Facts:
    """What was measured of a picture; None where the check is not in use."""

    clip_score: float | None = None
    contrast: float | None = None
    phash: str | None = None
    unsafe_score: float | None = None
    unsafe_concept: str | None = None


class Measures:
    """Measures pictures for a job's checks. ``sha256``: of the checks' models, by the checks' names."""

    def __init__(
        self,
        checks: Checks,
        scorer: Scorer | None = None,
        classifier: Classifier | None = None,
        sha256: dict[str, str] | None = None,
    ) -> None:
        self.checks, self._scorer, self._classifier = checks, scorer, classifier
        self.sha256 = sha256 or {}

    def __call__(self, pixels: np.ndarray, prompts: Sequence[str | None]) -> list[Facts]:
        """Of each picture of a full batch (B, H, W, 3) uint8. Empty slots have no prompt, and what is told of them
        means nothing; they are there so that what is told of a picture depends on no neighbour."""
        scores = self._scorer(pixels, prompts) if self._scorer is not None else [None] * len(pixels)
        unsafe = self._classifier(pixels) if self._classifier is not None else [(None, None)] * len(pixels)
        found = []
        for place, prompt in enumerate(prompts):
            if prompt is None:
                found.append(Facts())
                continue
            found.append(
                Facts(
                    clip_score=scores[place],
                    contrast=contrast(pixels[place]) if self.checks.blank is not None else None,
                    phash=perceptual_hash(pixels[place]) if self.checks.near_duplicates is not None else None,
                    unsafe_score=unsafe[place][0],
                    unsafe_concept=unsafe[place][1],
                )
            )
        return found
