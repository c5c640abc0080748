"""Requests that kill the process that makes them, and processes that die for reasons of their own."""

from __future__ import annotations

import csv
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import sdbatch as package
from sdbatch.engine.making.pool import Pool
from sdbatch.engine.planning.planner import make_plan, prepare
from sdbatch.errors import ModelError
from sdbatch.ledger import read_shards
from sdbatch.ledger.attempts import UNTRIED, Attempts, put_attempts, read_attempts, troubled_shards
from sdbatch.spec import load_spec
from sdbatch.storage import Store, open_store
from tests.conftest import CommandLine, Shell
from tests.engine.test_run import generators, kill_everything, with_no_mercy

Write = Callable[..., Path]

#: Loaded and computed in no time, so that a test takes no longer than what it is about.
NULL = {"uri": "builtin:null"}
DEADLY = str(Path(__file__).parent / "deadly")


@pytest.fixture
def deadly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts kill, in processes that are started from now on."""
    monkeypatch.setenv("PYTHONPATH", DEADLY)


def write_table(folder: Path, count: int, special: Mapping[int, str]) -> None:
    with (folder / "prompts.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["prompt"])
        for i in range(count):
            table.writerow([f"a red circle {i} {special.get(i, '')}".strip()])


def sums(folder: Path) -> dict[str, str]:
    """Image id → sha256 of the stored bytes, for pictures that were delivered."""
    rows = pq.read_table(folder / "metadata").to_pylist()
    return {row["image_id"]: row["sha256"] for row in rows if row["status"] == "committed"}


def errors(folder: Path) -> dict[int, str]:
    """Row → why it was quarantined."""
    rows = pq.read_table(folder / "metadata").to_pylist()
    return {int(row["row_id"]): row["error"] for row in rows if row["status"] == "quarantined"}


def test_deaths_are_counted_by_batch_and_then_by_request(tmp_path: Path) -> None:
    attempts = UNTRIED.after(8, False, "a crash")
    assert not attempts.suspect(8, range(8, 16))
    attempts = attempts.after(8, False, "a crash")
    assert attempts.suspect(8, range(8, 16))
    assert not attempts.suspect(0, range(8))
    attempts = attempts.after(9, True, "a crash").after(9, True, "exit code 7")
    assert attempts.killer(9, 3) is None
    assert attempts.killer(9, 2) == "it killed its process 2 times: a crash; exit code 7"
    assert attempts.killer(8, 2) is None
    store = open_store(str(tmp_path))
    assert troubled_shards(store) == set()
    put_attempts(store, "0000003", attempts)
    put_attempts(store, "0000003r2", Attempts())
    assert troubled_shards(store) == {"0000003", "0000003r2"}
    assert read_attempts(store, "0000003") == attempts


def test_a_request_alone_in_a_batch_is_suspect_once_it_killed() -> None:
    assert UNTRIED.after(5, True, "a crash").suspect(4, range(4, 8))


@pytest.mark.usefixtures("deadly")
def test_killers_are_quarantined_by_name_and_nobody_else(
    shell: Shell, sdbatch: CommandLine, write_job: Write, tmp_path: Path
) -> None:
    """Two kill their process, in one batch, two fail; all others are made as if those were not there."""
    killers = {70: "SIGSEGV", 71: "exit"}
    failing = {3: "raise", 72: "raise"}
    write_table(tmp_path, 80, killers | failing)
    sections: dict[str, Any] = {"model": NULL, "resources": {"actors": 2, "batch_size": 8}}
    job = write_job(**sections, output={"shard_size": 40}, failures={"max_failed_fraction": 0.1})
    made = json.loads(shell("run", job, "--json", code=3).stdout)
    assert (made["state"], made["committed"], made["quarantined"]) == ("complete", 76, 4)
    assert made["actor_deaths"] == 2 + 2 + 2  # as a batch, and each alone
    assert sdbatch.json("verify", "out")["ok"]
    told = errors(tmp_path / "out")
    assert set(told) == {*killers, *failing}
    for row in killers:
        assert told[row].startswith("it killed its process 2 times: it ended suddenly: by a crash (SIGSEGV")
    assert told[3] == "ArithmeticError: this one raises"
    assert troubled_shards(open_store(str(tmp_path / "out"))) == {"0000001"}

    sdbatch("run", write_job(**sections, output={"uri": str(tmp_path / "peace"), "shard_size": 40}))
    peace = sums(tmp_path / "peace")
    assert sums(tmp_path / "out") == {key: value for key, value in peace.items() if int(key[:-2]) not in told}


def test_a_killer_known_from_an_earlier_driver_is_not_tried_again(
    sdbatch: CommandLine, write_job: Write, tmp_path: Path
) -> None:
    write_table(tmp_path, 12, {})
    sdbatch("run", write_job(model=NULL, output={"uri": str(tmp_path / "peace")}))
    job = write_job(model=NULL)
    sdbatch("plan", job)
    attempts = Attempts({4: ("a crash", "a crash")}, {5: ("a crash", "exit code 7"), 6: ("a crash",)})
    put_attempts(open_store(str(tmp_path / "out")), "0000000", attempts)
    made = sdbatch.json("run", job, code=3)
    assert (made["committed"], made["actor_deaths"]) == (11, 0)
    assert errors(tmp_path / "out") == {5: "it killed its process 2 times: a crash; exit code 7"}
    peace = sums(tmp_path / "peace")
    del peace["00000005-0"]
    assert sums(tmp_path / "out") == peace
    assert sdbatch.json("verify", "out")["ok"]


def outlived(store: Store, form: str) -> int:
    """Batches of two that a dead actor left behind."""
    if form == "images":
        return len(list(store.list("data/"))) // 2
    return len(list(store.list("_sdbatch/batches/")))


@pytest.mark.usefixtures("deadly")
@pytest.mark.parametrize("form", ["images", "webdataset"])  # Parquet waits in tars, too
def test_a_death_costs_at_most_the_batches_in_flight(
    form: str, shell: Shell, sdbatch: CommandLine, write_job: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_table(tmp_path, 40, {})
    sections: dict[str, Any] = {"model": NULL, "resources": {"batch_size": 2}}
    sdbatch("run", write_job(**sections, output={"uri": str(tmp_path / "peace"), "shard_size": 40, "format": form}))
    job = write_job(**sections, output={"shard_size": 40, "format": form})
    store, slowly = open_store(str(tmp_path / "out")), tmp_path / "slowly"
    slowly.touch()
    monkeypatch.setenv("HOLD_BACK", str(slowly))
    process = shell.start("run", job, "--json")
    deadline = time.monotonic() + 300
    try:
        while outlived(store, form) < 4:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "no batches came"
            time.sleep(0.02)
        with_no_mercy(generators(process.pid)[0])
        left = outlived(store, form)
        slowly.unlink()
        out, err = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            kill_everything(process)
    assert process.returncode == 0, err
    made = json.loads(out)
    assert made["actor_deaths"] == 1
    assert made["batches"] <= 20 - left
    assert sdbatch.json("verify", "out")["ok"]
    assert sums(tmp_path / "out") == sums(tmp_path / "peace")


def test_a_model_that_goes_away_before_it_is_loaded_is_told_once(
    write_job: Write, tmp_path: Path, ray_here: None
) -> None:
    write_table(tmp_path, 4, {})
    shutil.copytree(Path(package.__file__).parent / "models/shapes", tmp_path / "model")
    prepared = prepare(load_spec(write_job(model={"uri": str(tmp_path / "model")})))
    job = make_plan(prepared, lambda rows: None)
    shutil.rmtree(tmp_path / "model")
    pool = Pool(prepared.located, job, lambda images, crew, deaths: None)
    with pytest.raises(ModelError, match="model"):
        list(pool.run(read_shards(prepared.store, job).makeable()))
    assert pool.deaths == 0


@pytest.mark.usefixtures("deadly")
def test_processes_that_die_while_they_load_end_the_job_soon(
    shell: Shell, write_job: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEADLY_LOAD", "1")
    write_table(tmp_path, 4, {})
    told = shell("run", write_job(model=NULL), code=1).stderr
    assert "2 generators died one after the other, before the model was loaded; the last: it ended suddenly" in told
