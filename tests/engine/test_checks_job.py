"""A whole job with checks, on ``builtin:null``: what its commands say of pictures that were dropped."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from sdbatch.engine.costs.speeds import Conditions
from sdbatch.engine.models.loading import find_job_checks
from sdbatch.errors import ModelError
from sdbatch.outputs import decode_metadata
from sdbatch.spec import parse_spec
from sdbatch.storage import open_store
from tests.conftest import CommandLine

CLIP = {"model": "builtin:shapes-clip"}
SPEC = {"name": "n", "input": {"uri": "x.csv"}, "output": {"uri": "out"}}


def test_pictures_that_checks_drop_are_told_counted_and_made_again_only_when_asked(
    sdbatch: CommandLine, write_job: Callable[..., Path], tmp_path: Path
) -> None:
    with (tmp_path / "prompts.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["prompt"], *([f"a red circle {i}"] for i in range(11)), [""]])
    checks = {"on_fail": "drop", "clip_score": {**CLIP, "min": 0.25}, "near_duplicates": {"on_fail": "tag"}}
    job = write_job(model={"uri": "builtin:null"}, checks=checks, resources={"actors": 2})
    wrong = sdbatch("validate", job, "--set", "checks.clip_score.model=nowhere", code=2)
    assert "checks.clip_score.model: model '" in wrong.stderr
    assert not (tmp_path / "out/_sdbatch").exists()

    made = sdbatch.json("run", job, code=3)  # a row without a prompt is no check's doing
    assert made["state"] == "complete"
    assert 0 < made["dropped"] == made["quarantined"] - 1 < 11
    assert sdbatch.json("verify", "out")["ok"]
    told = [failure["error"] for failure in sdbatch.json("errors", "out")]
    assert sum(error.startswith("check: clip_score is ") for error in told) == made["dropped"]
    status = sdbatch.json("status", "out")
    assert (status["quarantined"], status["dropped"]) == (made["quarantined"], made["dropped"])
    store = open_store(str(tmp_path / "out"))
    rows = [row for entry in store.list("metadata/") for row in decode_metadata(store.get(entry.key))]
    kept = next(row for row in rows if row["status"] == "committed")
    sdbatch("remake", "out", kept["image_id"], "--to", "again.png")
    assert (tmp_path / "again.png").read_bytes() == store.get(kept["path"])

    assert sdbatch.json("retry", "out", code=3)["made_now"] == 0  # the same seeds give the same pictures
    for change, refused in (
        ("checks.safety.model=builtin:shapes-clip", "would make other pictures than were made"),
        ("checks.best_of=2", "checks: which checks there are, and which columns they fill in, is planned"),
    ):
        assert refused in " ".join(sdbatch("retry", "out", "--set", change, code=2).stderr.split())
    again = sdbatch.json("retry", "out", "--set", "checks.clip_score.min=-1.0", code=3)
    assert (again["committed"], again["quarantined"], again["dropped"]) == (11, 1, 0)
    assert sdbatch.json("verify", "out")["ok"]


@pytest.mark.parametrize(
    ("check", "told"),
    [
        (
            {"clip_score": {"model": "builtin:shapes"}},
            "checks.clip_score.model: model 'builtin:shapes' is not built in",
        ),
        ({"clip_score": {"model": "builtin:null"}}, "checks.clip_score.model: model 'builtin:null' has no network"),
        ({"safety": {"model": "builtin:shapes-clip"}}, "for a CLIP name checks.safety.concepts"),
        ({"safety": {"model": "s3://no bucket/x"}}, "checks.safety.model: "),
    ],
)
def test_a_model_that_is_no_good_is_told_with_its_field(check: dict, told: str) -> None:
    with pytest.raises(ModelError, match=told):
        find_job_checks(parse_spec({**SPEC, "checks": check}))


def test_estimates_keep_jobs_with_and_without_checks_apart() -> None:
    plain, checked = (Conditions.of(parse_spec(spec), "f") for spec in (SPEC, {**SPEC, "checks": {"blank": {}}}))
    assert "checks" not in plain.content()
    assert plain.content() != {name: value for name, value in checked.content().items() if name != "checks"} | {
        "checks": ""
    }
    assert Conditions(**checked.content()) == checked
