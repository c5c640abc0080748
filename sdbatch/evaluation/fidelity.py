"""Prompt fidelity: which share of the pictures shows what its prompt says, by attribute, cell and setting.

Shares come with Wilson's score interval at 95 % (Wilson 1927), which stays between 0 and 1 also where all are right.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from statistics import NormalDist
from typing import Any

from sdbatch.evaluation.prompts import CELLS, Setting
from sdbatch.training.checker import Agreement, compare
from sdbatch.training.world import Scene

ATTRIBUTES = ("count", "background", "colour", "shape", "size", "place", "relation", "things", "placed", "all")
MEANING = {
    "count": "as many things",
    "background": "the background's colour",
    "colour": "the colour of each thing",
    "shape": "the shape of each thing",
    "size": "the size of each thing",
    "place": "where the one thing lies",
    "relation": "how the two things lie to each other",
    "things": "count, and each colour on its own shape",
    "placed": "things, and their place or relation",
    "all": "everything that was told",
    "shifted": "placed, held against the next prompt: what chance gives",
}

_Z = NormalDist().inv_cdf(0.975)


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share of which ``right`` in ``n`` were seen."""
    if n == 0:
        return 0.0, 1.0
    share, spread = right / n, _Z**2 / n
    middle = (share + spread / 2) / (1 + spread)
    half = _Z * sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(middle - half, 0.0) if right else 0.0, min(middle + half, 1.0) if right < n else 1.0


@dataclass(frozen=True)
class Reading:
    """A picture read back: the scene that was ``told`` and the one that is ``seen``."""

    cell: str
    number: int  # of the scene in its cell
    setting: Setting
    prompt: str
    path: str
    told: Scene
    seen: Scene

    @cached_property
    def agreement(self) -> Agreement:
        return compare(self.told, self.seen)


@dataclass(frozen=True)
class Rate:
    """``right`` of ``n`` pictures."""

    right: int
    n: int

    @property
    def share(self) -> float:
        return self.right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.right, self.n)

    def content(self) -> dict[str, Any]:
        low, high = self.interval
        return {"right": self.right, "n": self.n, "rate": self.share, "low": low, "high": high}


@dataclass(frozen=True)
class Cell:
    """The rates of one kind of scene at one setting, by attribute; attributes that were not told are left out.

    ``shifted`` is how often things are placed right when each picture is held against the next prompt; it
    should be about 0.
    """

    name: str
    n: int
    rates: dict[str, Rate]
    shifted: Rate | None  # None: there is no next prompt

    @property
    def label(self) -> str:
        return self.name.replace("-", ", ")

    def rate(self, name: str) -> Rate | None:
        return self.shifted if name == "shifted" else self.rates.get(name)


@dataclass(frozen=True)
class Fidelity:
    """The cells of each setting, in the order they were asked for."""

    settings: dict[Setting, list[Cell]]

    def content(self) -> list[dict[str, Any]]:
        """As JSON holds it."""
        return [
            {
                "sampler": setting.sampler,
                "num_inference_steps": setting.num_inference_steps,
                "guidance_scale": setting.guidance_scale,
                "cells": [
                    {
                        "cell": cell.name,
                        "things": CELLS[cell.name][0],
                        "novel": CELLS[cell.name][1],
                        "n": cell.n,
                        "rates": {name: rate.content() for name, rate in cell.rates.items()},
                        "shifted": cell.shifted.content() if cell.shifted else None,
                    }
                    for cell in cells
                ],
            }
            for setting, cells in self.settings.items()
        ]


def measure(readings: Iterable[Reading], settings: Sequence[Setting]) -> Fidelity:
    """Count what is right, setting by setting and cell by cell; those without pictures are left out."""
    groups: dict[tuple[Setting, str], list[Reading]] = {}
    for reading in readings:
        groups.setdefault((reading.setting, reading.cell), []).append(reading)
    found: dict[Setting, list[Cell]] = {}
    for setting in settings:
        cells = [_cell(name, groups[setting, name]) for name in CELLS if (setting, name) in groups]
        if cells:
            found[setting] = cells
    return Fidelity(found)


def _cell(name: str, readings: Sequence[Reading]) -> Cell:
    ordered = sorted(readings, key=lambda reading: reading.number)
    rates = {}
    for attribute in ATTRIBUTES:
        told = [right for reading in ordered if (right := getattr(reading.agreement, attribute)) is not None]
        if told:
            rates[attribute] = Rate(sum(told), len(told))
    nexts = [*ordered[1:], ordered[0]]
    shifted = sum(compare(other.told, reading.seen).placed for reading, other in zip(ordered, nexts, strict=True))
    return Cell(name, len(ordered), rates, Rate(shifted, len(ordered)) if len(ordered) > 1 else None)
