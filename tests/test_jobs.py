"""The jobs that come with the project run as they stand, but for fewer steps here."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sdbatch.spec import load_spec
from tests.conftest import CommandLine

ROOT = Path(__file__).parents[1]
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))
#: Jobs for clusters and checkpoints that are not here.
ELSEWHERE = {path.stem for path in JOBS if load_spec(path).resources.gpus_per_actor}


@pytest.mark.parametrize("job", [path for path in JOBS if path.stem not in ELSEWHERE], ids=lambda path: path.stem)
def test_a_job_for_this_machine_runs(job: Path, sdbatch: CommandLine, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs")
    quick = ["--set", "generate.num_inference_steps=3", "--set", "resources.actors=2"]
    made = sdbatch.json("run", f"jobs/{job.name}", *quick)
    assert made["state"] == "complete"
    assert made["committed"] == made["planned"] > 0
    assert sdbatch.json("verify", made["output"])["ok"]


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.stem)
def test_a_job_says_what_it_is_for_and_how_it_is_run(job: Path) -> None:
    head = job.read_text(encoding="utf-8").partition("name:")[0]
    assert f"sdbatch run jobs/{job.name}" in head or f"sdbatch submit jobs/{job.name}" in head
    assert len(head) > 100
