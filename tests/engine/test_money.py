"""Whole jobs with money in them: estimated, billed, stopped by their budget, resumed with the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdbatch.engine.making import pool
from sdbatch.engine.making.generator import Generator
from sdbatch.engine.making.pool import Pool
from sdbatch.engine.planning.planner import make_plan, prepare
from sdbatch.ledger import Run, begin_run, put_run, read_runs, read_shards
from sdbatch.spec import load_spec
from sdbatch.storage import Store, open_store
from tests.conftest import CommandLine
from tests.engine.test_run import sums, write_prompts

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A record of speeds of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/sdbatch/speeds.json"


def begun(store: Store, **taken: Any) -> Run:
    run = begin_run(store, Run(**taken))
    put_run(store, run)
    return run


def test_a_job_is_estimated_when_its_speed_is_known_and_billed_beside_the_estimate(
    sdbatch: CommandLine, write_job: Write, tmp_path: Path, record: Path
) -> None:
    write_prompts(tmp_path, 20)
    job = write_job(resources={"usd_per_gpu_hour": 3.6})
    unknown = sdbatch.json("plan", job)
    assert (unknown["estimate"], unknown["left"], unknown["spent_usd"]) == (None, 20, 0)
    assert "not measured yet: run with --calibrate" in sdbatch("plan", job).stderr

    calibrated = sdbatch.json("plan", job, "--calibrate")
    before = calibrated["estimate"]
    assert (before["images"], before["shards"], before["batches"], before["source"]) == (20, 3, 5, "a calibration")
    assert before["usd"] == pytest.approx(3.6 * before["actor_hours"], abs=1e-5)
    assert before["wall_seconds"] > before["starting_seconds"] > 0
    assert not (tmp_path / "out/data").exists()
    assert calibrated["fingerprint"] == unknown["fingerprint"]

    told = sdbatch.json("run", job)
    took, run = told["took"], read_runs(open_store(str(tmp_path / "out")))[0]
    assert told["estimate"] == before
    assert took["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out/data").rglob("*.png"))
    assert abs(before["bytes"] - took["bytes"]) < 0.1 * took["bytes"]
    assert took["usd"] == pytest.approx(3.6 * took["actor_hours"], abs=1e-5)
    assert told["spent_usd"] == pytest.approx(took["usd"], abs=1e-5)
    assert took["wall_seconds"] * 1.01 > 3600 * took["actor_hours"] > 0
    assert (run.ended, run.images, run.batches, run.actors) == ("complete", 20, 5, 0)
    # What the run measured is known from now on, to this output and, by the record, to others.
    assert len(json.loads(record.read_text())) == 1
    other = write_job(output={"uri": str(tmp_path / "other")}, resources={"usd_per_gpu_hour": 3.6})
    assert sdbatch.json("plan", other)["estimate"]["source"] == "earlier runs"
    assert sdbatch.json("plan", write_job())["left"] == 0
    assert "nothing is left to make" in sdbatch("plan", write_job()).stderr


@pytest.fixture
def seconds_fly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool looks often, and by its clock a hundred seconds have gone once any batch is stored."""
    stored = []

    def actor_seconds(self: Pool) -> float:
        stored.extend(member for member in self._members if member.longest)
        return 100.0 if stored else 1.0

    monkeypatch.setattr(pool, "_POLL", 0.05)
    monkeypatch.setattr(Pool, "actor_seconds", actor_seconds)


@pytest.mark.usefixtures("seconds_fly")
def test_a_budget_stops_a_job_which_goes_on_with_a_larger_one_to_the_same_bytes(
    sdbatch: CommandLine, write_job: Write, tmp_path: Path
) -> None:
    write_prompts(tmp_path, 24)
    one_shard: dict[str, Any] = {"output": {"format": "webdataset", "shard_size": 24}}
    prices = {"usd_per_gpu_hour": 3600.0}
    stopped = sdbatch("run", write_job(**one_shard, resources={**prices, "budget_usd": 50}), code=1).stderr
    assert "$100.00 of $50.00 are spent; 24 of 24 images are left to make" in stopped
    assert "raise resources.budget_usd, and the same command goes on" in stopped
    store = open_store(str(tmp_path / "out"))
    (run,) = read_runs(store)
    assert (run.ended, run.images, run.usd()) == ("budget spent", 0, 100.0)
    kept = len(list(store.list("_sdbatch/batches/")))
    assert kept  # the shard is not done, and yet what was made of it stays
    assert sdbatch.json("status", "out")["committed"] == 0

    ended = sdbatch.json("run", write_job(**one_shard, resources={**prices, "budget_usd": 1000}))
    assert (ended["committed"], ended["batches"], ended["runs"], ended["spent_usd"]) == (24, 6 - kept, 2, 200)
    assert sdbatch.json("verify", "out")["ok"]
    sdbatch("run", write_job(output={**one_shard["output"], "uri": str(tmp_path / "whole")}))
    assert sums(store) == sums(open_store(str(tmp_path / "whole")))


def test_what_killed_runs_took_counts_and_nothing_is_started_when_it_was_all(
    sdbatch: CommandLine, write_job: Write, tmp_path: Path
) -> None:
    write_prompts(tmp_path, 8)
    job = write_job(resources={"usd_per_gpu_hour": 3600.0, "budget_usd": 100.0})
    sdbatch("plan", job)
    store = open_store(str(tmp_path / "out"))
    begun(store, ended="interrupted", actor_seconds=60.0, usd_per_actor_hour=3600.0)
    begun(store, actors=1, actor_seconds=36.0)  # killed: five seconds more
    refused = sdbatch.json("run", job, code=1)
    assert refused["kind"] == "BudgetSpent"
    assert "resources.budget_usd: $101.00 of $100.00 are spent" in refused["error"]
    assert not list(store.list("_sdbatch/lease/"))
    assert len(read_runs(store)) == 2
    planned = sdbatch("plan", job).stderr
    assert "$101.00 so far" in planned


def test_a_budget_that_would_not_pay_for_a_first_batch_is_not_begun_with(
    sdbatch: CommandLine, write_job: Write, tmp_path: Path
) -> None:
    write_prompts(tmp_path, 8)
    sdbatch("plan", write_job(), "--calibrate")
    job = write_job(resources={"usd_per_gpu_hour": 3600.0, "budget_usd": 0.01})
    assert "will not be enough" in sdbatch("plan", job).stderr
    told = " ".join(sdbatch("run", job, code=1).stderr.split())
    assert "the rest does not pay for 1 actor(s) to load the model and make a batch each" in told
    (run,) = read_runs(open_store(str(tmp_path / "out")))
    assert (run.ended, run.actor_seconds) == ("budget spent", 0.0)


def test_a_damaged_account_is_told_where_money_counts_and_stops_nothing_elsewhere(
    sdbatch: CommandLine, write_job: Write, tmp_path: Path
) -> None:
    write_prompts(tmp_path, 4)
    open_store(str(tmp_path / "out")).put("_sdbatch/runs/0000001.json", b"{")
    job = write_job(model={"uri": "builtin:null"}, resources={"usd_per_gpu_hour": 1.0, "budget_usd": 5.0})
    told = sdbatch("run", job, code=1).stderr
    assert "_sdbatch/runs/0000001.json is damaged" in told
    assert "remove it to go on without what that run took" in told
    sdbatch("run", write_job(model={"uri": "builtin:null"}))


@pytest.mark.parametrize("form", ["images", "webdataset"])
def test_a_halted_generator_ends_its_batch_and_keeps_it(
    form: str, write_job: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_here: None
) -> None:
    write_prompts(tmp_path, 8)
    prepared = prepare(load_spec(write_job(model={"uri": "builtin:null"}, output={"format": form})))
    job = make_plan(prepared, lambda rows: None)
    (shard,) = read_shards(prepared.store, job)
    halted = Generator(prepared.located.model_dump(mode="json"), job)
    halted.load()
    draw = halted.model.draw

    def draw_then_halt(*given: Any) -> Any:
        halted.halt()
        return draw(*given)

    monkeypatch.setattr(halted.model, "draw", draw_then_halt)
    assert halted.run_shard(shard) is None
    assert halted.longest_batch() > 0
    assert not list(prepared.store.list("_sdbatch/commits/"))
    another = Generator(prepared.located.model_dump(mode="json"), job)
    another.load()
    receipt = another.run_shard(shard)
    assert receipt is not None
    assert (receipt.committed, receipt.batches) == (8, 1)
