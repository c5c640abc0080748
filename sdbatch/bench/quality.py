"""The gate: may something that changes pictures be used? Drawn with it and without, how far are they apart?

Two things must hold: pictures stay alike (PSNR, in the median of all pictures), and prompts are met as well as
before (CLIP's score, in the mean).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from sdbatch.bench.clock import Setting, draws, psnr
from sdbatch.bench.subject import Subject
from sdbatch.bench.techniques import Technique, as_in_jobs
from sdbatch.bench.waterfall import LEAST_PSNR, prepared
from sdbatch.diffusion.checkpoint import Checkpoint
from sdbatch.diffusion.clip import CLIP
from sdbatch.diffusion.locate import local_path
from sdbatch.errors import JobFailed

#: The share of CLIP's score that may be lost.
MOST_DRIFT = 0.01
#: What PSNR counts as for pictures that are the same to the bit.
_SAME = 99.0

_SCORERS = {"builtin:shapes": "shapes-clip"}


@dataclass(frozen=True)
class Quality:
    """``psnr``: decibels between the pictures with and without; ``score``: CLIP's, without and with, if measured."""

    pictures: int
    psnr: float  # the median
    psnr_least: float
    score: tuple[float, float] | None = None

    @property
    def drift(self) -> float | None:
        """The share of the score that is lost; negative where it is won."""
        return None if self.score is None else 1 - self.score[1] / self.score[0]

    @property
    def reasons(self) -> list[str]:
        """Why it does not pass; none where it does."""
        reasons = []
        if not self.psnr >= LEAST_PSNR:
            reasons.append(f"{self.psnr:.1f} dB in the median, at least {LEAST_PSNR:g} should be")
        if self.drift is not None and not self.drift <= MOST_DRIFT:
            reasons.append(f"{100 * self.drift:.2f} % of CLIP's score is lost, at most {100 * MOST_DRIFT:g} % may be")
        return reasons

    def told(self) -> dict[str, object]:
        return {**asdict(self), "drift": self.drift, "passed": not self.reasons, "reasons": self.reasons}

    def line(self) -> str:
        of_clip = "CLIP's score was not measured"
        if self.score is not None and self.drift is not None:
            of_clip = f"CLIP's score {self.score[0]:.4f}, then {self.score[1]:.4f} ({-100 * self.drift:+.2f} %)"
        return f"{self.pictures} pictures: {self.psnr:.1f} dB in the median, {self.psnr_least:.1f} at least; {of_clip}"

    def refuse(self, what: str) -> None:
        """Raise JobFailed unless it passes."""
        if self.reasons:
            raise JobFailed(f"{what} does not pass the gate: {'; '.join(self.reasons)}")


def gate(
    checkpoint: Checkpoint,
    setting: Setting,
    apply: Callable[[Subject], None],
    pictures: int,
    batch: int,
    scorer: CLIP | None,
    *fields: str,
) -> Quality:
    """Draw so many pictures by the model as jobs have it, with these fields of their spec set, and by one that was
    changed by ``apply`` as well."""
    torch.set_num_threads(setting.threads)
    ours = as_in_jobs(setting.device, *fields)
    plain, changed = (prepared(checkpoint, setting, how) for how in (ours, (Technique("", apply), *ours)))
    apart: list[float] = []
    scores: tuple[list[float], list[float]] = [], []
    for first in range(0, pictures, batch):
        numbers = range(first, first + batch)
        prompts = [_prompt(number) for number in numbers]
        both = [draws(subject, setting)(prompts, list(numbers)) for subject in (plain, changed)]
        for one, other in zip(*both, strict=True):
            distance = psnr(one, other)
            apart.append(_SAME if distance is None else distance)
        if scorer is not None:
            for drawn, kept in zip(both, scores, strict=True):
                kept.extend(scorer.score(drawn, prompts).tolist())
    score = None if scorer is None else (float(np.mean(scores[0])), float(np.mean(scores[1])))
    return Quality(len(apart), statistics.median(apart), min(apart), score)


def find_scorer(uri: str, model: str, device: str) -> CLIP | None:
    """The CLIP model that scores, a folder; left out, the built-in one for the built-in model. Raises ModelError."""
    if uri:
        return CLIP.from_pretrained(local_path(uri), device)
    built_in = _SCORERS.get(model)
    return None if built_in is None else CLIP.from_pretrained(_MODELS / built_in, device)


_MODELS = Path(__file__).parents[1] / "models"
# Words that the built-in model knows, and any other.
_COLOURS = ("red", "blue", "green", "yellow", "orange", "purple", "pink", "black")
_SHAPES = ("circle", "square", "triangle", "star", "ring", "diamond", "cross")
_RELATIONS = ("above", "below", "left of", "right of")


def _prompt(number: int) -> str:
    """Two things, each prompt another pair until all were had."""
    place, colour = number % len(_RELATIONS), number % len(_COLOURS)
    one, other = number % len(_SHAPES), (number // len(_SHAPES) + 1) % len(_SHAPES)
    beside = _COLOURS[(colour + 1 + number // len(_COLOURS)) % len(_COLOURS)]
    return f"a {_COLOURS[colour]} {_SHAPES[one]} {_RELATIONS[place]} a {beside} {_SHAPES[other]}"
