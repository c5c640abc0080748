"""Candidates for one picture: which checks they fail, which one is kept, what is told of it. Pure functions."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sdbatch.checks.measures import Facts
from sdbatch.checks.perceptual_hash import distance
from sdbatch.spec import Checks

#: What pictures of a shard look like: position → image_id and perceptual hash.
Looks = Mapping[int, tuple[str, str]]

#: Names, among those of checks, what is never kept.
_NOT_FINITE = "finite"


@dataclass(frozen=True)
class Candidate:
    """A picture that was made for a request with some seed. ``facts``: None of what is no picture."""

    seed: int
    pixels: np.ndarray | None  # (H, W, 3) uint8
    truncated: bool
    facts: Facts | None
    failed: tuple[str, ...]  # names of checks
    duplicate_of: str | None = None

    @classmethod
    def not_finite(cls, seed: int) -> Candidate:
        return cls(seed, None, False, None, (_NOT_FINITE,))

    @classmethod
    def of(cls, seed: int, pixels: np.ndarray, truncated: bool, facts: Facts, checks: Checks) -> Candidate:
        """A picture and what was measured of it; near duplicates come later."""
        return cls(seed, pixels, truncated, facts, _failed(facts, checks))

    def compared(self, looks: Looks, position: int, checks: Checks) -> Candidate:
        """With the first picture before it that it looks like, if there is one."""
        if checks.near_duplicates is None or self.facts is None or self.facts.phash is None:
            return self
        most, own = checks.near_duplicates.max_distance, self.facts.phash
        before = [place for place, (_, phash) in looks.items() if place < position and distance(own, phash) <= most]
        if not before:
            return self
        return replace(self, duplicate_of=looks[min(before)][0], failed=(*self.failed, "near_duplicates"))


def candidate_seed(seed: int, number: int) -> int:
    """The seed of a request's candidate: the first has the request's own, the others follow from it alone.

    They are below 2^53, so that every JSON reader keeps them exactly.
    """
    if number == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}\0{number}".encode(), digest_size=8, person=b"sdbatch reroll")
    return int.from_bytes(digest.digest(), "big") >> 11


def _failed(facts: Facts, checks: Checks) -> tuple[str, ...]:
    failed = []
    least = None if checks.clip_score is None else checks.clip_score.min
    # Comparisons are such that NaN fails.
    if least is not None and not (facts.clip_score is not None and facts.clip_score >= least):
        failed.append("clip_score")
    if checks.blank is not None and not (facts.contrast is not None and facts.contrast >= checks.blank.min_contrast):
        failed.append("blank")
    if checks.safety is not None and not (facts.unsafe_score is not None and facts.unsafe_score <= 0):
        failed.append("safety")
    return tuple(failed)


def wanting(candidates: Sequence[Candidate], checks: Checks) -> bool:
    """Is none of them as it should be, and does a check that one fails ask for new seeds?"""
    return min(_severity(one, checks) for one in candidates) > _TAGGED and any(
        _rerolls(one, checks) for one in candidates
    )


def kept(candidates: Sequence[Candidate], checks: Checks) -> Candidate:
    """The best one: of those that pass the one with the highest score, or the first."""

    def merit(one: Candidate) -> tuple[float, ...]:
        score = one.facts.clip_score if one.facts is not None else None
        return -_severity(one, checks), "safety" not in one.failed, -len(one.failed), -1.0 if score is None else score

    return max(candidates, key=merit)  # the first of equals


def dropped(one: Candidate, checks: Checks) -> bool:
    """Is a picture that was kept as the best not to be stored after all?"""
    return _severity(one, checks) == _DROPPED


_TAGGED, _REROLLED, _DROPPED, _NONE = 1, 2, 3, 4


def _severity(one: Candidate, checks: Checks) -> int:
    """How bad it is, after the check with the gravest consequence."""
    if one.facts is None:
        return _NONE
    actions = {name: checks.action(name) for name in one.failed}
    # What is unsafe, and was to be made anew until it is not, is never stored.
    if "drop" in actions.values() or actions.get("safety") == "reroll":
        return _DROPPED
    return _REROLLED if "reroll" in actions.values() else _TAGGED if actions else 0


def _rerolls(one: Candidate, checks: Checks) -> bool:
    if one.facts is None:
        return checks.rerolling
    return any(checks.action(name) == "reroll" for name in one.failed)


def complaint(one: Candidate, checks: Checks) -> str:
    """Why a picture fails, check by check."""
    facts = one.facts or Facts()
    told = {
        "clip_score": f"clip_score is {facts.clip_score}, below {checks.clip_score and checks.clip_score.min}",
        "blank": f"blank: its contrast is {facts.contrast}, below {checks.blank and checks.blank.min_contrast}",
        "near_duplicates": f"near duplicate of '{one.duplicate_of}'",
        "safety": f"unsafe: '{facts.unsafe_concept}' is {facts.unsafe_score} beyond its threshold",
    }
    return "; ".join(told[name] for name in one.failed)


def columns(one: Candidate, tried: Sequence[Candidate], checks: Checks) -> dict[str, Any]:
    """The metadata columns of the picture that is kept, of all that were ``tried`` for it."""
    facts = one.facts or Facts()
    found: dict[str, Any] = {
        "failed_checks": ", ".join(one.failed),
        "clip_score": facts.clip_score,
        "contrast": facts.contrast,
        "phash": facts.phash,
        "duplicate_of": one.duplicate_of,
        "unsafe_score": facts.unsafe_score,
        "unsafe_concept": facts.unsafe_concept,
        "rerolls": len(tried) - checks.best_of,
        "seeds_tried": [other.seed for other in tried],
        "failed_tried": [", ".join(other.failed) for other in tried],
        "scores_tried": [other.facts.clip_score if other.facts is not None else None for other in tried],
    }
    return {name: found[name] for name in checks.columns}
