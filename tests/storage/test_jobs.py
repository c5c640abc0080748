"""Whole jobs on stores that fail them: killed between data and commit, refused in the midst, on a disk that is full."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sdbatch.ledger import read_status
from sdbatch.storage import Store, open_store
from sdbatch.storage.s3 import S3Store
from tests.conftest import CommandLine, Shell
from tests.engine.test_run import kill_everything, write_prompts
from tests.fault_proxy import FaultProxy

Write = Callable[..., Path]
NULL = {"uri": "builtin:null"}


def wait_for(store: Store, prefix: str, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while len(list(store.list(prefix))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"nothing came under {prefix}"
        time.sleep(0.05)


def test_a_job_refused_in_the_midst_or_killed_between_data_and_commit_goes_on(
    shell: Shell,
    sdbatch: CommandLine,
    write_job: Write,
    tmp_path: Path,
    proxy: FaultProxy,
    direct: S3Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_prompts(tmp_path, 24)
    job = write_job(model=NULL, output={"uri": direct.uri, "format": "webdataset", "shard_size": 8})
    proxy.set({"503 SlowDown": 1.0}, only=r"^PUT .*_sdbatch/commits/")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        process = shell.start("run", job)
        wait_for(direct, "metadata/", 2, process)  # and no record can follow
        kill_everything(process)
        stored = {entry.key: direct.get(entry.key) for entry in direct.list("metadata/")}
        assert list(direct.list("_sdbatch/commits/")) == []
        process = shell.start("run", job)
        refused = proxy.counts()["503 SlowDown"]
        deadline = time.monotonic() + 120
        while proxy.counts()["503 SlowDown"] == refused:  # until an actor is at it again
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        proxy.set({"400 ExpiredToken": 1.0})
        _, told = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "renew the credentials and run the same command again" in told
    assert "Traceback" not in told
    assert proxy.counts()["400 ExpiredToken"] < 40  # each asks once; nobody storms
    made = sdbatch.json("run", job)
    assert (made["state"], made["committed"]) == ("complete", 24)
    assert made["batches"] <= 2 * (3 - len(stored))  # what was stored is not made again
    assert {key: direct.get(key) for key in stored} == stored
    verdict = sdbatch.json("verify", direct.uri)
    assert (verdict["ok"], verdict["extra"]) == (True, [])


def test_a_job_ends_when_the_disk_is_full_and_goes_on_when_there_is_room(
    sdbatch: CommandLine, write_job: Write, tmp_path: Path, small_disk: Path
) -> None:
    write_prompts(tmp_path, 400)
    job = write_job(model=NULL, output={"uri": str(small_disk / "out"), "shard_size": 20})
    told = sdbatch("run", job, code=1).stderr
    assert "the disk is full; free some space and run the same command again" in told
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    store = open_store(str(small_disk / "out"))
    assert read_status(store).committed < 400
    sdbatch("run", job)
    found = read_status(store)  # not by the command: Ray tells on stdout of actors that the failed run let go
    assert (found.state, found.committed) == ("complete", 400)
    sdbatch("verify", small_disk / "out")


def test_signals_while_planning_end_it_once_whatever_their_number(
    shell: Shell, sdbatch: CommandLine, write_job: Write, tmp_path: Path
) -> None:
    write_prompts(tmp_path, 100_000)
    job, store = write_job(model=NULL), open_store(str(tmp_path / "out"))
    process = shell.start("plan", job)
    wait_for(store, "_sdbatch/plan/", 1, process)
    for _ in range(2):
        process.terminate()
        time.sleep(0.2)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on from here" in told
    assert "Traceback" not in told
    assert "holds no job" in sdbatch("status", "out", code=2).stderr
