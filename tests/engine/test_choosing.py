"""Choosing among candidates that are drawn by lot: whatever is kept of an interrupted shard, it ends the same."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sdbatch.checks import Facts, Measures, candidate_seed
from sdbatch.engine.making.batch import Made, NotFinite, Refused, Result
from sdbatch.engine.making.choosing import Chooser
from sdbatch.ledger import DROPPED
from sdbatch.prompts import ImageRequest
from sdbatch.spec import Checks

ACTIONS = st.sampled_from(["tag", "drop", "reroll"])
CHECKS = st.builds(
    lambda first, second, third, rerolls, best_of: Checks.model_validate(
        {
            "rerolls": rerolls,
            "best_of": best_of,
            "clip_score": {"model": "m", "min": 0.4, "on_fail": first},
            "near_duplicates": {"max_distance": 0, "on_fail": second},
            "safety": {"model": "m", "on_fail": third},
        }
    ),
    *(ACTIONS, ACTIONS, ACTIONS, st.integers(1, 4), st.integers(1, 3)),
)
COUNT, SIZE = 10, 4


def lot(seed: int, what: str, sides: int) -> int:
    digest = hashlib.sha256(f"{seed} {what}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % sides


class Lots(Measures):
    """Facts by lot. A picture's pixels are the digits of its seed."""

    def __call__(self, pixels: np.ndarray, prompts: Sequence[str | None]) -> list[Facts]:
        assert len(pixels) == len(prompts) == SIZE  # the full batch, always
        return [
            Facts() if prompt is None else self.facts(seed_of(one)) for one, prompt in zip(pixels, prompts, strict=True)
        ]

    def facts(self, seed: int) -> Facts:
        return Facts(
            clip_score=lot(seed, "score", 10) / 10,
            phash=f"{lot(seed, 'look', 6):016x}",
            unsafe_score=lot(seed, "unsafe", 3) - 1.5,
            unsafe_concept="x",
        )


def seed_of(pixels: np.ndarray) -> int:
    return int.from_bytes(pixels.tobytes()[:8], "big")


def draw(batch: Mapping[int, ImageRequest]) -> dict[int, Result]:
    made: dict[int, Result] = {}
    for position, request in batch.items():
        if lot(request.seed, "finite", 12) == 0:
            made[position] = NotFinite()
        elif request.prompt == "impossible":
            made[position] = Refused("impossible")
        else:
            digits = np.frombuffer(request.seed.to_bytes(8, "big") + b"\0", np.uint8)
            made[position] = Made(digits.reshape(1, 3, 3), False)
    return made


def requests(number: int) -> dict[int, ImageRequest]:
    def request(position: int) -> ImageRequest:
        prompt = "impossible" if lot(number + position, "prompt", 15) == 0 else "a red circle"
        seed = lot(number, f"seed {position}", 2**53)
        return ImageRequest(f"{position}-0", str(position), prompt, "", seed, 8, 8, 1, 1.0, "ddim")

    return {position: request(position) for position in range(COUNT)}


def told(result: Result) -> tuple[Any, ...]:
    pixels = seed_of(result.pixels) if isinstance(result, Made) else None
    return type(result), pixels, getattr(result, "error", None), dict(result.columns)


def made(checks: Checks, wanted: Mapping[int, ImageRequest], kept: Mapping[int, Result]) -> dict[int, Result]:
    """Batch by batch what is not kept, as a generator does."""
    chooser, results = Chooser(Lots(checks), SIZE), dict(kept)
    looks = {at: (wanted[at].image_id, one.columns["phash"]) for at, one in kept.items() if isinstance(one, Made)}
    for first in range(0, COUNT, SIZE):
        batch = {at: wanted[at] for at in range(first, min(first + SIZE, COUNT)) if at not in kept}
        results |= chooser.choose(first, batch, draw, looks).results
    return results


@settings(max_examples=300)
@given(CHECKS, st.integers(0, 10**6), st.sets(st.integers(0, COUNT - 1)))
def test_what_is_kept_of_a_shard_changes_nothing(checks: Checks, number: int, kept: Collection[int]) -> None:
    wanted = requests(number)
    whole = made(checks, wanted, {})
    stored = {at: one for at, one in whole.items() if at in kept and isinstance(one, Made)}
    again = made(checks, wanted, stored)
    assert {at: told(one) for at, one in again.items()} == {at: told(one) for at, one in whole.items()}


@given(CHECKS, st.integers(0, 10**6))
def test_every_request_ends_as_its_candidates_and_those_before_it_say(checks: Checks, number: int) -> None:
    assume("seeds_tried" in checks.columns)
    wanted = requests(number)
    looks = dict[str, int]()
    for at, result in sorted(made(checks, wanted, {}).items()):
        if isinstance(result, Refused) and result.error == "impossible":
            assert result.columns == {}
            continue
        columns, seed = result.columns, wanted[at].seed
        tried = [candidate_seed(seed, k) for k in range(len(columns["seeds_tried"]))]
        assert columns["seeds_tried"] == tried
        assert checks.best_of <= len(tried) <= checks.best_of + checks.rerolls
        for one, failed, score in zip(tried, columns["failed_tried"], columns["scores_tried"], strict=True):
            facts = Lots(checks).facts(one)
            expected = []
            if lot(one, "finite", 12) == 0:
                expected = ["finite"]
            else:
                expected += ["clip_score"] if facts.clip_score is not None and facts.clip_score < 0.4 else []
                expected += ["safety"] if facts.unsafe_score is not None and facts.unsafe_score > 0 else []
                expected += ["near_duplicates"] if facts.phash in looks else []
                assert score == facts.clip_score
            assert failed == ", ".join(expected)
        passing = [k for k, failed in enumerate(columns["failed_tried"]) if not failed]
        if passing:
            assert columns["seed"] == tried[max(passing, key=lambda k: columns["scores_tried"][k])]
            assert isinstance(result, Made)
        if isinstance(result, Made):
            looks.setdefault(str(columns["phash"]), at)
            assert seed_of(result.pixels) == columns["seed"]
        else:
            assert isinstance(result, NotFinite) or result.error.startswith(DROPPED)


def test_a_batch_is_asked_again_for_all_that_failed_at_once() -> None:
    asked = []

    def listening(batch: Mapping[int, ImageRequest]) -> dict[int, Result]:
        asked.append(sorted(batch))
        return draw(batch)

    checks = Checks.model_validate({"on_fail": "reroll", "rerolls": 3, "clip_score": {"model": "m", "min": 0.95}})
    wanted = {at: dataclasses.replace(one, prompt="a ring") for at, one in requests(3).items() if at < SIZE}
    choice = Chooser(Lots(checks), SIZE).choose(0, wanted, listening, {})
    assert asked == [[0, 1, 2, 3]] * 4
    assert choice.draws == 4
