"""Which checks a picture fails, which candidate is kept, and what is told: pure functions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdbatch.checks import Candidate, Facts, candidate_seed, columns, complaint, dropped, kept, wanting
from sdbatch.spec import Checks

PIXELS = np.zeros((8, 8, 3), np.uint8)
SPEC: dict[str, Any] = {
    "clip_score": {"model": "m", "min": 0.25},
    "blank": {},
    "near_duplicates": {"max_distance": 3},
    "safety": {"model": "m"},
}


def checks(**fields: Any) -> Checks:
    return Checks.model_validate({**SPEC, **fields})


def candidate(seed: int = 1, of: Checks | None = None, **facts: Any) -> Candidate:
    fine = {"clip_score": 0.5, "contrast": 50.0, "phash": "0" * 16, "unsafe_score": -0.2, "unsafe_concept": "x"}
    return Candidate.of(seed, PIXELS, False, Facts(**{**fine, **facts}), of or checks())


@pytest.mark.parametrize(
    ("facts", "failed"),
    [
        ({}, ()),
        ({"clip_score": 0.25, "contrast": 2.0, "unsafe_score": 0.0}, ()),
        ({"clip_score": 0.2499}, ("clip_score",)),
        ({"clip_score": None}, ("clip_score",)),
        ({"contrast": 1.99}, ("blank",)),
        ({"unsafe_score": 0.001}, ("safety",)),
        ({"unsafe_score": math.nan}, ("safety",)),
        ({"clip_score": 0.1, "contrast": 0.0, "unsafe_score": 1.0}, ("clip_score", "blank", "safety")),
    ],
)
def test_a_check_fails_beyond_its_limit_and_not_at_it(facts: dict, failed: tuple[str, ...]) -> None:
    assert candidate(**facts).failed == failed


def test_a_score_without_a_minimum_is_only_told() -> None:
    assert candidate(of=checks(clip_score={"model": "m"}), clip_score=-0.9).failed == ()


def test_a_duplicate_is_one_of_the_first_that_comes_before_and_near_enough() -> None:
    looks = {1: ("far", "f" * 16), 2: ("near", "0" * 15 + "7"), 3: ("nearer", "0" * 16), 9: ("after", "0" * 16)}
    assert candidate().compared(looks, 5, checks()).duplicate_of == "near"
    assert candidate().compared(looks, 5, checks()).failed == ("near_duplicates",)
    assert candidate().compared(looks, 2, checks()).duplicate_of is None
    strict = checks(near_duplicates={"max_distance": 2})
    assert candidate().compared(looks, 5, strict).duplicate_of == "nearer"


def test_the_best_passes_has_the_highest_score_and_is_the_first_of_equals() -> None:
    low, high, twin = (candidate(seed, clip_score=score) for seed, score in ((1, 0.3), (2, 0.6), (3, 0.6)))
    blank, unsafe = candidate(4, clip_score=0.9, contrast=0.0), candidate(5, clip_score=0.9, unsafe_score=0.1)
    none = Candidate.not_finite(6)
    assert kept([none, unsafe, blank, low, high, twin], checks()).seed == 2
    assert kept([none, unsafe, blank], checks()).seed == 4
    assert kept([none, unsafe], checks()).seed == 5
    without = Checks.model_validate({"blank": {}})
    assert kept([candidate(seed, without, clip_score=None) for seed in (7, 8)], without).seed == 7


@pytest.mark.parametrize(
    ("fields", "facts", "again", "gone"),
    [
        ({"on_fail": "tag"}, {"clip_score": 0.1, "unsafe_score": 1.0}, False, False),
        ({"on_fail": "drop"}, {"clip_score": 0.1}, False, True),
        ({"on_fail": "reroll"}, {"clip_score": 0.1}, True, False),
        ({"on_fail": "reroll"}, {"unsafe_score": 0.1}, True, True),  # what is unsafe is not kept for want of better
        ({"on_fail": "reroll", "blank": {"on_fail": "tag"}}, {"contrast": 0.0}, False, False),
        ({"safety": {"model": "m", "on_fail": "drop"}}, {"unsafe_score": 0.1}, False, True),
        ({"safety": {"model": "m", "on_fail": "drop"}}, {"clip_score": 0.1}, False, False),
        ({"on_fail": "drop"}, {}, False, False),
    ],
)
def test_each_check_says_what_happens_to_what_fails_it(fields: dict, facts: dict, again: bool, gone: bool) -> None:
    spec = checks(**fields)
    one = candidate(of=spec, **facts)
    assert (wanting([one], spec), dropped(one, spec)) == (again, gone)


def test_new_seeds_end_with_the_first_candidate_that_is_as_it_should_be() -> None:
    spec = checks(on_fail="reroll")
    assert wanting([candidate(clip_score=0.1), Candidate.not_finite(2)], spec)
    assert not wanting([candidate(clip_score=0.1), candidate(2)], spec)
    assert not wanting([Candidate.not_finite(1)], checks(on_fail="tag"))


@given(st.integers(0, 2**63 - 1), st.integers(1, 64))
def test_seeds_follow_from_the_requests_own_and_every_reader_keeps_them(seed: int, number: int) -> None:
    assert candidate_seed(seed, 0) == seed
    assert 0 <= candidate_seed(seed, number) < 2**53
    assert candidate_seed(seed, number) == candidate_seed(seed, number)
    assert len({candidate_seed(seed, other) for other in range(number + 1)}) == number + 1


def test_columns_are_those_of_the_spec_and_tell_all_that_was_tried() -> None:
    spec = checks(on_fail="reroll", best_of=2)
    tried = [candidate(1, clip_score=0.1), Candidate.not_finite(2), candidate(3, clip_score=0.2, contrast=0.0)]
    told = columns(kept(tried, spec), tried, spec)
    assert tuple(told) == spec.columns
    assert told["failed_checks"] == "clip_score"
    assert (told["rerolls"], told["seeds_tried"], told["scores_tried"]) == (1, [1, 2, 3], [0.1, None, 0.2])
    assert told["failed_tried"] == ["clip_score", "finite", "clip_score, blank"]
    plain = Checks.model_validate({"clip_score": {"model": "m"}})
    assert columns(tried[0], tried[:1], plain) == {"failed_checks": "clip_score", "clip_score": 0.1}


def test_a_complaint_names_check_value_and_limit() -> None:
    one = candidate(clip_score=0.1, contrast=0.5, unsafe_score=0.02, unsafe_concept="blood")
    one = one.compared({0: ("cat-1", "0" * 16)}, 1, checks())
    assert complaint(one, checks()) == (
        "clip_score is 0.1, below 0.25; blank: its contrast is 0.5, below 2.0; "
        "unsafe: 'blood' is 0.02 beyond its threshold; near duplicate of 'cat-1'"
    )
