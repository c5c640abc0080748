"""The section ``checks``: what it refuses, by field and before anything is looked at, and what it decides."""

from __future__ import annotations

from typing import Any

import pytest

from sdbatch.checks import FoundChecks
from sdbatch.engine.models.loading import located_checks
from sdbatch.errors import SpecError
from sdbatch.spec import parse_spec

BASE: dict[str, Any] = {"name": "n", "input": {"uri": "x.csv"}, "output": {"uri": "out"}}
CLIP = {"model": "builtin:shapes-clip"}


@pytest.mark.parametrize(
    ("checks", "told"),
    [
        ({}, "checks: name no check; there is clip_score, blank, near_duplicates, safety"),
        ({"on_fail": "explode", "blank": {}}, "checks.on_fail: is 'explode' (there is: tag, drop, reroll)"),
        ({"rerolls": 0, "blank": {}}, "checks.rerolls: is 0; should be greater than or equal to 1"),
        ({"best_of": 2.5, "clip_score": CLIP}, "checks.best_of: is 2.5"),
        ({"best_of": 4, "blank": {}}, "checks: have best_of but no clip_score to tell which candidate is the best"),
        ({"clip_score": {"min": 0.3}}, "checks.clip_score.model: is required"),
        ({"clip_score": {**CLIP, "min": 1.5}}, "checks.clip_score.min: is 1.5; should be less than or equal to 1"),
        ({"clip_score": {**CLIP, "min": "high"}}, "checks.clip_score.min: is 'high'; should be a valid number"),
        ({"clip_score": {**CLIP, "min": float("nan")}}, "checks.clip_score.min: is nan"),
        ({"clip_score": {**CLIP, "on_fail": "drop"}}, "checks.clip_score: has an on_fail but no min"),
        ({"on_fail": "reroll", "clip_score": CLIP}, "checks: have on_fail: reroll, but clip_score has no min"),
        ({"clip_score": {**CLIP, "mni": 1}}, "checks.clip_score.mni: no such field (did you mean 'min'?)"),
        ({"clip_score": {"model": "s3://me:secret@x/clip"}}, "checks.clip_score.model: holds credentials"),
        ({"blank": True}, "checks.blank: is True; should be a section ({} takes all of its fields as they are)"),
        ({"blank": {"min_contrast": 0}}, "checks.blank.min_contrast: is 0; should be greater than 0"),
        ({"near_duplicates": {"max_distance": 40}}, "checks.near_duplicates.max_distance: is 40; should be less than"),
        ({"safety": {**CLIP, "concepts": {"blood": 2}}}, "checks.safety.concepts.blood: is 2; should be less than"),
        ({"safety": {**CLIP, "concepts": ["blood"]}}, "checks.safety.concepts: is list"),
        ({"safety": {**CLIP, "concepts": {str(k): 0.1 for k in range(101)}}}, "has 101 concepts; at most 100"),
        ("all", "checks: is 'all'; should be a section"),
    ],
)
def test_a_mistake_is_told_with_its_field(checks: Any, told: str) -> None:
    with pytest.raises(SpecError) as refused:
        parse_spec({**BASE, "checks": checks})
    assert told in str(refused.value)


@pytest.mark.parametrize("given", [{"input": {"uri": "x", "keep": ["phash"]}}, {"matrix": {"phash": ["a", "b"]}}])
def test_columns_of_checks_are_nobody_elses(given: dict) -> None:
    words = {"prompt": {"template": "{phash}"}} if "matrix" in given else {}
    parse_spec({**BASE, **given, **words})
    with pytest.raises(SpecError, match="checks: fill in the column phash"):
        parse_spec({**BASE, **given, **words, "checks": {"near_duplicates": {}}})


def test_what_checks_are_decides_and_where_their_models_lie_does_not() -> None:
    def deciding(**check: Any) -> Any:
        return parse_spec({**BASE, "checks": {"clip_score": {**CLIP, **check}}}).deciding()

    assert deciding() == deciding(model="/mnt/clip") != deciding(min=0.2)
    assert "checks" not in parse_spec(BASE).deciding()


def test_actors_get_the_revision_that_was_found(tmp_path: Any) -> None:
    checks = {"clip_score": {"model": "hf:studio/clip"}, "safety": {"model": "hf:studio/sd/safety_checker"}}
    snapshot = tmp_path / "models--studio--clip/snapshots/abc"
    found = FoundChecks({}, {"clip_score": snapshot, "safety": snapshot / "safety_checker"})
    located = located_checks(parse_spec({**BASE, "checks": checks}).checks, found)
    assert located is not None
    assert located.models == {"clip_score": "hf:studio/clip@abc", "safety": "hf:studio/sd@abc/safety_checker"}
    near = parse_spec({**BASE, "checks": {"clip_score": {"model": "clip"}}}).checks
    located = located_checks(near, FoundChecks({}, {"clip_score": tmp_path}))
    assert located is not None
    assert located.models["clip_score"].startswith("/")
