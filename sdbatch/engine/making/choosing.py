"""Candidates made and judged: the best of several, new seeds for what fails, and what is dropped.

What becomes of a request depends on it alone and, for near duplicates, on what is kept of the requests before it in
its shard: on no other neighbour, on no batch and no actor. So a request whose candidates are fine by themselves waits
until those before it in the batch are settled, and is only then compared with them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np

from sdbatch.checks import Candidate, Facts, Measures, candidate_seed, columns, complaint, dropped, kept, wanting
from sdbatch.engine.making.batch import Coming, Made, NotFinite, Refused, Result, arrived
from sdbatch.ledger import DROPPED
from sdbatch.prompts import ImageRequest

#: Makes some requests of a batch, each in its slot.
Draw = Callable[[Mapping[int, ImageRequest]], Mapping[int, Result | Coming]]


@dataclass(frozen=True)
class Choice:
    """What is kept of a batch. ``draws``: how often the model was asked; ``seconds``: that the checks took of it."""

    results: Mapping[int, Result | Coming]
    draws: int
    seconds: float


@dataclass
class _Trial:
    """A request and what was made for it. ``refused``: why nothing can be."""

    request: ImageRequest
    candidates: list[Candidate] = field(default_factory=list)
    refused: Refused | None = None
    settled: bool = False


class Chooser:
    """Has candidates made and keeps the best. ``size``: of a batch."""

    def __init__(self, measures: Measures, size: int) -> None:
        self._measures, self._checks, self._size = measures, measures.checks, size

    def choose(
        self,
        first: int,
        batch: Mapping[int, ImageRequest],
        draw: Draw,
        looks: dict[int, tuple[str, str]],
        since: Mapping[int, int] = MappingProxyType({}),
    ) -> Choice:
        """Make the best of a batch whose first slot is position ``first``.

        ``looks``: of what is kept of the shard so far; this batch's are added. ``since``: the editions in which
        requests that had failed were made after all: those before were compared with nothing that came later.
        """
        trials = {position: _Trial(request) for position, request in sorted(batch.items())}
        draws, seconds = 0, 0.0
        again = trials
        while again:
            for _ in range(self._checks.best_of if not draws else 1):
                again = {position: trial for position, trial in again.items() if trial.refused is None}
                if again:
                    seconds += self._try(first, again, draw)
                    draws += 1
            again = self._settle(trials, looks, since)
        return Choice({position: self._ended(trial) for position, trial in trials.items()}, draws, seconds)

    def _try(self, first: int, trials: Mapping[int, _Trial], draw: Draw) -> float:
        """One more candidate for each; returns the seconds that it took to check them."""
        seeds = {at: candidate_seed(trial.request.seed, len(trial.candidates)) for at, trial in trials.items()}
        made = arrived(draw({at: replace(trial.request, seed=seeds[at]) for at, trial in trials.items()}))
        began = time.perf_counter()
        pictures = {at: result for at, result in made.items() if isinstance(result, Made)}
        facts = self._measure(first, trials, pictures)
        for at, trial in trials.items():
            result = made[at]
            if isinstance(result, Made):
                one = Candidate.of(seeds[at], result.pixels, result.truncated, facts[at], self._checks)
                trial.candidates.append(one)
            elif isinstance(result, NotFinite):
                trial.candidates.append(Candidate.not_finite(seeds[at]))
            else:
                trial.refused = result
        return time.perf_counter() - began

    def _measure(self, first: int, trials: Mapping[int, _Trial], pictures: Mapping[int, Made]) -> dict[int, Facts]:
        """What is measured of pictures, each in its slot of a full batch."""
        if not pictures:
            return {}
        pixels = np.zeros((self._size, *next(iter(pictures.values())).pixels.shape), np.uint8)
        prompts: list[str | None] = [None] * self._size
        for at, picture in pictures.items():
            pixels[at - first], prompts[at - first] = picture.pixels, trials[at].request.prompt
        facts = self._measures(pixels, prompts)
        return {at: facts[at - first] for at in pictures}

    def _settle(
        self, trials: Mapping[int, _Trial], looks: dict[int, tuple[str, str]], since: Mapping[int, int]
    ) -> dict[int, _Trial]:
        """Settle what can be; returns those that need another candidate."""
        again, comparing = dict[int, _Trial](), self._checks.near_duplicates is not None
        waiting = False  # for one before to be settled
        for position, trial in trials.items():
            if trial.settled or trial.refused is not None:
                continue
            found, fewest = trial.candidates, self._checks.best_of
            if not waiting:
                there = {at: look for at, look in looks.items() if since.get(at, 1) <= since.get(position, 1)}
                found = [one.compared(there, position, self._checks) for one in found]
            if len(found) < fewest + self._checks.rerolls and wanting(found, self._checks):
                again[position] = trial
            elif not waiting:
                trial.settled, trial.candidates = True, found
                one = kept(found, self._checks)
                if one.facts is not None and one.facts.phash is not None and not dropped(one, self._checks):
                    looks[position] = trial.request.image_id, one.facts.phash
            waiting = comparing and not trial.settled
        return again

    def _ended(self, trial: _Trial) -> Result:
        if trial.refused is not None:
            return trial.refused
        one = kept(trial.candidates, self._checks)
        told = {"seed": one.seed, **columns(one, trial.candidates, self._checks)}
        if one.pixels is None:
            return NotFinite(columns=told)
        if dropped(one, self._checks):
            return Refused(DROPPED + complaint(one, self._checks), told)
        return Made(one.pixels, one.truncated, told)
