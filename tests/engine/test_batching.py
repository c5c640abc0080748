"""Batch sizes: what auto decides, what stays decided, and what a batch that does not fit is told."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdbatch.engine import machine
from sdbatch.engine.planning import batching
from sdbatch.engine.planning.batching import decided, too_large
from sdbatch.errors import UsageError
from sdbatch.prompts import ModelFacts
from sdbatch.spec import JobSpec, parse_spec
from tests.conftest import CommandLine

FACTS = ModelFacts((64, 64))


def spec_with(batch: Any, gpus: int = 0, **generate: Any) -> JobSpec:
    return parse_spec(
        {
            "name": "t",
            "input": {"uri": "x.csv"},
            "generate": generate,
            "output": {"uri": "out"},
            "resources": {"batch_size": batch, "gpus_per_actor": gpus},
        }
    )


def affine(batch: int) -> int:
    return 100 + 10 * batch


def test_auto_takes_as_many_as_help_and_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decided(spec_with("auto"), FACTS, None).resources.at_once == 8
    assert decided(spec_with("auto", width=128, height=64), FACTS, None).resources.at_once == 4
    assert decided(spec_with("auto", width=512, height=512), FACTS, None).resources.at_once == 1
    monkeypatch.setattr(batching, "footprint", lambda spec, width, height: affine)
    monkeypatch.setattr(batching, "device_bytes", lambda resources: 159)
    assert decided(spec_with("auto"), FACTS, None).resources.at_once == 4


def test_a_number_is_left_as_it_is() -> None:
    spec = spec_with(7)
    assert decided(spec, FACTS, None) is spec


def test_auto_needs_to_see_the_gpu_that_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match="batch_size: is auto, but no GPU"):
        decided(spec_with("auto", gpus=1), FACTS, None)
    spec = spec_with(64, gpus=1)
    assert decided(spec, FACTS, None) is spec


def test_a_batch_that_does_not_fit_is_told_what_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "footprint", lambda spec, width, height: affine)
    monkeypatch.setattr(batching, "device_bytes", lambda resources: 175)
    with pytest.raises(UsageError, match=r"batch_size: 9 pictures of 64x64 .* at most 7 do"):
        decided(spec_with(9, gpus=1), FACTS, None)
    spec = spec_with(7, gpus=1)
    assert decided(spec, FACTS, None) is spec
    assert too_large(3, 64, 64, affine, 105).endswith("nor does a single one; make smaller pictures")
    assert too_large(8, 64, 64, affine, 10_000).endswith("at most 4 do"), "it did not, whatever was computed"


@pytest.mark.parametrize("batch", [0, 1025, "many", 2.5, True])
def test_other_batch_sizes_are_refused(batch: Any) -> None:
    with pytest.raises(UsageError, match="1 to 1,024, or auto"):
        spec_with(batch)


def test_the_number_is_in_the_plan_and_stays(
    sdbatch: CommandLine, write_job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.csv").write_text("prompt\n" + "a red circle\n" * 9)
    job = write_job(model={"uri": "builtin:null"}, resources={"batch_size": "auto"})
    assert sdbatch.json("plan", job)["batch_size"] == 128, "of 16x16 pixels"
    monkeypatch.setattr(batching, "_ENOUGH", {"cpu": 64 * 64})
    assert sdbatch.json("run", job)["committed"] == 9
    assert "resources.batch_size: 128 → 4" in sdbatch("run", job, "--set", "resources.batch_size=4", code=2).stderr


@pytest.mark.parametrize(("quota", "cpus"), [(3.0, 3), (0.5, 1), (None, os.cpu_count())])
def test_a_container_has_the_cores_of_its_quota(
    quota: float | None, cpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray._private.utils._get_docker_cpus", lambda: quota)
    assert machine.cpus() == cpus
