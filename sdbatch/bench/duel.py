"""Ours against diffusers' best: the same weights and requests in one process, batch by batch in turns."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from sdbatch.bench.clock import Requests, Setting, draws, measure, once, psnr
from sdbatch.bench.rival import RECIPES, rival_draws, saved
from sdbatch.bench.techniques import Technique
from sdbatch.bench.waterfall import prepared
from sdbatch.diffusion.checkpoint import Checkpoint


@dataclass(frozen=True)
class Duel:
    """``ours`` and ``theirs``: images a second of each turn; ``ratios``: ours over theirs, turn by turn."""

    batch: int
    recipe: str  # of theirs, the fastest
    ours: list[float]
    theirs: list[float]
    psnr: float | None  # how far the two's pictures are from each other, in decibels

    @property
    def ratios(self) -> list[float]:
        return [mine / other for mine, other in zip(self.ours, self.theirs, strict=True)]

    def told(self) -> dict[str, object]:
        ratios = self.ratios
        return {
            "batch": self.batch,
            "recipe": self.recipe,
            "ours": round(statistics.median(self.ours), 4),
            "theirs": round(statistics.median(self.theirs), 4),
            "ratio": round(statistics.median(ratios), 4),
            "ratio_from": round(min(ratios), 4),
            "ratio_to": round(max(ratios), 4),
            "ratios": [round(ratio, 4) for ratio in ratios],
            "psnr": self.psnr,
        }


def duel(
    checkpoint: Checkpoint,
    setting: Setting,
    ours_has: Sequence[Technique],
    batches: Sequence[int],
    turns: int,
    *,
    compiled: bool,
) -> Iterator[Duel]:
    """For each batch size the fastest of their recipes is found, then both make batches in turns.

    Who begins changes from turn to turn. ``compiled``: may they compile; ours does if ``ours_has`` says so.
    """
    for batch in batches:
        subject = prepared(checkpoint, setting, ours_has)
        # Their pipeline gets weights as they were loaded: techniques of ours that change layers are ours.
        with saved(prepared(checkpoint, setting, ()), setting.dtype) as folder:
            names = [name for name in RECIPES if compiled or "compiled" not in name]
            rivals = {name: rival_draws(folder, setting, name) for name in names}
        tries = {name: measure(rival, setting, batch, 2, Requests()) for name, rival in rivals.items()}
        recipe = min(tries, key=lambda name: min(tries[name].seconds))
        theirs, ours = rivals[recipe], draws(subject, setting)
        rivals.clear()
        requests = Requests()
        once(ours, setting, batch, requests)
        prompts, seeds = Requests().batch(batch)
        distance = psnr(ours(prompts, seeds), theirs(prompts, seeds))
        rates: tuple[list[float], list[float]] = [], []
        for turn in range(turns):
            for side in (0, 1) if turn % 2 == 0 else (1, 0):
                seconds = once((ours, theirs)[side], setting, batch, requests)
                rates[side].append(batch / seconds)
        yield Duel(batch, recipe, *rates, distance)
        del theirs, ours, subject
        if setting.device == "cuda":
            torch.cuda.empty_cache()
