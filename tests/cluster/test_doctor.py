"""The doctor finds what is wrong, by trying it, and says what to do."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sdbatch import cli
from sdbatch.engine import doctor
from sdbatch.engine.models.loading import footprint
from sdbatch.engine.planning.batching import decided
from sdbatch.errors import UsageError
from sdbatch.prompts import ModelFacts
from sdbatch.spec import load_spec
from sdbatch.storage import LocalStore, open_store
from sdbatch.storage.s3 import S3Store
from tests.conftest import CommandLine

Write = Callable[..., Path]


@pytest.fixture
def job(write_job: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "prompts.csv").write_text("prompt\na red circle\n")
    return write_job()


def examined(folder: Path, *arguments: str | Path, code: int = 0) -> dict[str, dict[str, Any]]:
    told = CommandLine(folder).json("doctor", *arguments, code=code)
    assert told["ok"] == (code == 0)
    return {found["check"]: found for found in told["checks"]}


def test_a_job_that_can_run_is_fine_and_nothing_stays_behind(job: Path, tmp_path: Path) -> None:
    found = examined(tmp_path, job)
    assert {"versions", "open files", "gpu", "ray", "model", "memory", "input", "output", "clock"} <= set(found)
    assert found["model"]["state"] == found["output"]["state"] == found["clock"]["state"] == "fine"
    assert "GB at batches of 4" in found["memory"]["told"]
    assert list(LocalStore(tmp_path / "out").list()) == []


def test_without_a_job_it_looks_at_the_machine(tmp_path: Path) -> None:
    assert set(examined(tmp_path)) == {"versions", "open files", "temporary files", "gpu", "ray"}


@pytest.mark.parametrize(
    ("changes", "check", "told"),
    [
        (["resources.gpus_per_actor=1"], "gpu", "gpus_per_actor"),
        (["model.uri=builtin:nothing"], "model", "builtin:nothing"),
        (["input.columns={id: no_such}"], "input", "no_such"),
        (["output.uri=job.yaml/out"], "output", "can't be written"),
        (["resources.batch_size=1024", "generate={width: 2048, height: 2048}"], "memory", "lower resources.batch_size"),
    ],
)
def test_what_is_wrong_is_named_with_a_remedy(
    changes: list[str], check: str, told: str, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    sets = [word for change in changes for word in ("--set", change)]
    found = examined(tmp_path, job, *sets, code=2)[check]
    assert found["state"] == "bad"
    assert told in f"{found['told']} {found['remedy']}"
    assert found["remedy"]


def test_memory_is_judged_as_the_planner_does(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    spec = load_spec(job, ["resources.gpus_per_actor=1", "model.dtype=float16"])
    takes = footprint(spec, 64, 64)(4)
    for memory, state in ((1.17 * takes, "bad"), (1.19 * takes, "fine")):  # 85 % of it is to be had
        whole = SimpleNamespace(total_memory=memory)
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda number, whole=whole: whole)
        (found,) = doctor._memory(spec)
        assert found.state == state
        with pytest.raises(UsageError, match="do not fit") if state == "bad" else nullcontext():
            decided(spec, ModelFacts((64, 64)), None)


def test_it_tells_people_line_by_line(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.call(["doctor", str(job), "--set", "model.uri=builtin:nothing"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("✗ model: ") and " → " in line for line in lines)
    assert any(line.startswith("✓ input: ") for line in lines)


def test_rights_are_tried_on_s3_too(job: Path, bucket: str, tmp_path: Path) -> None:
    output = f"s3://{bucket}/out"
    found = examined(tmp_path, job, "--set", f"output.uri={output}")
    assert found["output"]["state"] == found["clock"]["state"] == "fine"
    assert list(open_store(output).list()) == []
    missing = examined(tmp_path, job, "--set", f"output.uri={output}", "--set", "input.uri=s3://no-such/x.csv", code=2)
    assert "no bucket 'no-such'" in missing["input"]["told"]


def test_a_store_that_lets_a_second_writer_win_is_bad(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(store: LocalStore, key: str, data: bytes) -> bool:
        if not store.exists(key):
            store.put(key, data)
        return True

    monkeypatch.setattr(LocalStore, "put_if_absent", put)
    found = examined(tmp_path, job, code=2)["output"]
    assert "a second conditional put was not refused" in found["told"]


@pytest.mark.parametrize(("off", "state"), [(0, "fine"), (60, "odd"), (-4000, "bad")])
def test_a_clock_that_is_off_is_told(
    off: int, state: str, job: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store's clock is the Date of its answers."""
    head = S3Store._head

    def shifted(store: S3Store, key: str) -> dict[str, Any]:
        answer = head(store, key)
        answer["ResponseMetadata"]["HTTPHeaders"]["date"] = formatdate(time.time() + off, usegmt=True)
        return answer

    monkeypatch.setattr(S3Store, "_head", shifted)
    found = {one.check: one.state for one in doctor._rights(load_spec(job, [f"output.uri=s3://{bucket}/out"]))}
    assert found == {"output": "fine", "clock": state}
