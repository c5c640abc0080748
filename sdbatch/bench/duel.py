"""Ours against diffusers' best: the same weights and requests in one process, batch by batch in turns."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from sdbatch.bench.back_to_back import IN_A_ROW, DrawAll, draws_back_to_back, timed
from sdbatch.bench.clock import Requests, Setting, Timing, measure, psnr
from sdbatch.bench.rival import RECIPES, rival_draws, saved
from sdbatch.bench.techniques import Technique
from sdbatch.bench.waterfall import attempt, prepared
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
    kept: Sequence[Technique],
    batch: int,
    turns: int,
    *,
    compiled: bool,
) -> Duel:
    """The fastest of their recipes is found, then both make batches in turns: on a GPU several a turn, ours beside each
    other as jobs have it, else one.

    Who begins changes from turn to turn. ``compiled``: may they compile; ours does if ``kept`` says so.
    """
    subject = prepared(checkpoint, setting, kept)
    # Their pipeline gets weights as they were loaded: techniques of ours that change layers are ours.
    with saved(prepared(checkpoint, setting, ()), setting.dtype) as folder:
        names = [name for name in RECIPES if compiled or "compiled" not in name]
        rivals = {name: rival_draws(folder, setting, name) for name in names}
    tries = {name: attempt(partial(measure, rival, setting, batch, 2, Requests())) for name, rival in rivals.items()}
    times = {name: min(timing.seconds) for name, timing in tries.items() if isinstance(timing, Timing)}
    if not times:
        raise RuntimeError(f"diffusers makes none: {next(iter(tries.values()))}")
    recipe = min(times, key=times.__getitem__)
    theirs, ours = rivals[recipe], draws_back_to_back(subject, setting)
    rivals.clear()
    requests, at_once = Requests(), IN_A_ROW if setting.device == "cuda" else 1
    prompts, seeds = requests.batch(batch)
    distance = psnr(ours([(prompts, seeds)])[0], theirs(prompts, seeds))
    sides: tuple[DrawAll, DrawAll] = ours, lambda batches: [theirs(*one) for one in batches]
    rates: tuple[list[float], list[float]] = [], []
    for turn in range(turns):
        for side in (0, 1) if turn % 2 == 0 else (1, 0):
            seconds, _ = timed(sides[side], setting, [requests.batch(batch) for _ in range(at_once)])
            rates[side].append(at_once * batch / seconds)
    return Duel(batch, recipe, *rates, distance)
