"""What is told of a job while it runs: how fast it is, why requests failed, who is at work."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from sdbatch import cli
from sdbatch.cli.console import watching
from sdbatch.engine.live import Live
from sdbatch.engine.making.pool import Worker
from sdbatch.engine.snapshot import Snapshot
from sdbatch.ledger import CommitRecord, collect, hold_lease, put_totals, read_driver, read_progress, reason
from sdbatch.ledger.progress import images_per_second
from sdbatch.ledger.reasons import OTHERS, summed
from sdbatch.storage import LocalStore
from tests.ledger.planned import Planned


def record(number: int, at: float) -> CommitRecord:
    return CommitRecord(number, 0, "", "w", 8, 0, 0, "", "", [], {"model": 1.0, "shard": 2.0}, {}, at)


def test_speed_is_that_since_the_last_pause() -> None:
    slow = [record(i, 10.0 * i) for i in range(40)]
    fast = [record(i, 90_000 + 2.0 * i) for i in range(10)]
    assert images_per_second(slow) == pytest.approx(0.8)
    assert images_per_second([*slow, *fast]) == pytest.approx(4.0)
    assert images_per_second([record(0, 10.0), record(1, 10.2)]) == pytest.approx(16 / 2.2)  # made side by side
    assert images_per_second(slow[:1]) == images_per_second([]) == 0.0
    assert images_per_second([replace(one, seconds={}) for one in slow]) == 0.0  # refused, not made
    retried = [replace(one, edition=2, replaced={"committed": 7, "quarantined": 1, "bytes": 0}) for one in slow]
    assert images_per_second(retried) == pytest.approx(0.1)  # one of eight was made, the others carried over


@pytest.mark.parametrize(
    ("errors", "told"),
    [
        (["row 2: the prompt is empty", "row 31,002: the prompt is empty"], "the prompt is empty"),
        (["row 4: the id 'a' is row 1's already"], "the id '…' is row N's already"),
        (["init_image: a/b.png does not exist", "init_image: /c d/e.png does not exist"], None),
        (["OSError: [Errno 28]\n no space"], "OSError: [Errno N] no space"),
        (["it killed its process 2 times: SIGSEGV"], "it killed its process N times: SIGSEGV"),
    ],
)
def test_messages_that_differ_in_numbers_and_names_are_one_reason(errors: list[str], told: str | None) -> None:
    found = {reason(error) for error in errors}
    assert found == {told} or (told is None and all("does not exist" in one for one in found))


def test_reasons_without_end_are_summed_in_bounded_room() -> None:
    sums: dict[str, int] = {}
    for i in range(500):
        sums = summed(sums, {f"reason {chr(97 + i % 26)}{chr(97 + i // 26)}": 1}, {})
    assert len(sums) == 51
    assert sum(sums.values()) == 500
    assert summed({"a": 1}, {}, {"a": 1}) == {}
    assert summed({"a": 1, OTHERS: 3}, {}, {"b": 2}) == {"a": 1, OTHERS: 1}


def test_reasons_are_the_same_however_far_records_are_collected(tmp_path: Path) -> None:
    planned = Planned(LocalStore(tmp_path), slices=2)
    expected = {"it failed": 4, "the prompt is empty": 2}
    for shard in planned.shards:
        planned.commit(shard.number, failing=(0, 1) if shard.number in {0, 4} else ())
    assert read_progress(planned.store).reasons == expected
    for number in (0, 1):
        shards = [shard.number for shard in planned.shards if shard.slice == number]
        collect(planned.store, number, 1, shards)
        assert read_progress(planned.store).reasons == expected
    put_totals(planned.store)
    assert read_progress(planned.store).reasons == expected
    # Sums of a release that did not know reasons are made anew.
    key = "_sdbatch/committed/totals.json"
    sums = json.loads(planned.store.get(key))
    del sums["reasons"]
    planned.store.put(key, json.dumps(sums | {"committed": 0}).encode())
    progress = read_progress(planned.store)
    assert (progress.status.committed, progress.reasons) == (14, expected)


def test_a_driver_tells_what_it_is_at_and_when_it_has_ended(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    assert read_driver(store) is None
    now: dict[str, Any] = {"stage": "making", "actors": 2}
    with hold_lease(store, print, lambda: now):
        driver = read_driver(store)
        assert driver is not None
        assert (driver.state, driver.now) == ("alive", now)
    ended = read_driver(store)
    assert ended is not None
    assert (ended.state, ended.now) == ("ended", now)
    holder = {"token": "t", "host": "node-7", "boot": "another", "pid": 1, "since": "1"}
    store.put("_sdbatch/lease/0000009.json", json.dumps(holder).encode())
    store.put("_sdbatch/lease/0000009.beat.json", json.dumps({"beat": 1, "at": 5.0}).encode())
    gone = read_driver(store)
    assert gone is not None
    assert (gone.state, gone.host) == ("silent", "node-7")


def test_watching_ends_as_the_job_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planned = Planned(LocalStore(tmp_path))
    with hold_lease(planned.store, print):
        pass
    holder = {"token": "t", "host": "node-7", "boot": "another", "pid": 7, "since": "1"}
    planned.store.put("_sdbatch/lease/0000002.json", json.dumps(holder).encode())
    reads = []

    def beat() -> None:
        """Its driver is elsewhere, on a machine whose clock is years behind: it goes on, then ends."""
        reads.append(1)
        told = {"beat": len(reads), "at": 5.0, "now": {"stage": "making", "in_flight": len(reads), "actors": 1}}
        told |= {"ended": True} if len(reads) > 2 else {}
        planned.store.put("_sdbatch/lease/0000002.beat.json", json.dumps(told).encode())

    class Watched(LocalStore):
        def get(self, key: str) -> bytes:
            if key == "_sdbatch/job.yaml":
                beat()
            return super().get(key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli.progress, "open_output", lambda output: Watched(tmp_path))
        assert cli.call(["watch", str(tmp_path), "--every", "0.2"]) == 1
    assert "nobody is at work on it any more" in capsys.readouterr().err
    for shard in planned.shards:
        planned.commit(shard.number)
    assert cli.call(["watch", str(tmp_path)]) == 3
    assert "is complete, 10 of 10, 1 quarantined" in capsys.readouterr().err
    assert cli.call(["watch", str(tmp_path / "nothing")]) == 2


def test_a_job_that_is_being_planned_is_no_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = LocalStore(tmp_path)
    with hold_lease(store, print, lambda: {"stage": "planning", "rows": 31_000}):
        assert cli.call(["status", str(tmp_path)]) == 0
        told = " ".join(capsys.readouterr().err.split())
        assert "is being planned by driver" in told
        assert "rows read 31,000" in told
        assert cli.call(["status", str(tmp_path), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["state"], told["planned"], told["driver"]["now"]["rows"]) == ("planning", 0, 31_000)
    assert cli.call(["status", str(tmp_path)]) == 2  # it ended, and left no plan


@pytest.mark.parametrize(("planned", "code"), [(True, 3), (False, 1)])
def test_watching_begins_before_there_is_a_plan(
    planned: bool, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ExitStack() as driver:
        driver.enter_context(hold_lease(LocalStore(tmp_path), print, lambda: {"stage": "planning", "rows": 10}))
        looks: list[int] = []

        class Watched(LocalStore):
            def get(self, key: str) -> bytes:
                if key == "_sdbatch/job.yaml":
                    looks.append(1)
                    if len(looks) == 2:
                        driver.close()
                        if planned:
                            job = Planned(LocalStore(tmp_path))
                            for shard in job.shards:
                                job.commit(shard.number)
                return super().get(key)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cli.progress, "open_output", lambda output: Watched(tmp_path))
            assert cli.call(["watch", str(tmp_path), "--every", "0.2"]) == code
    told = capsys.readouterr().err
    assert ", 10 rows read" in told
    assert ("is complete, 10 of 10" in told) == planned
    assert ("nobody is at work on it any more" in told) == (not planned)


def test_a_view_counts_the_actors_that_a_driver_does_not_tell_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned, live = Planned(LocalStore(tmp_path)), Live(lambda now: None)
    crew = tuple(Worker(number, "node-7", "at work", 3, (number,)) for number in range(1, 101))
    live(Snapshot("making", planned=10, actors=100, crew=crew, deaths=2))
    with hold_lease(planned.store, print, live.tell):
        assert cli.call(["status", str(tmp_path)]) == 0
    told = capsys.readouterr().err
    assert "and 84 more" in told
    assert "2 of the actors, which died" in told


def test_a_round_has_a_speed_of_its_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What is made again is counted anew: the bar falls back to nothing, its speed does not."""
    clock = count(step=10)
    monkeypatch.setattr(cli.console.time, "monotonic", lambda: float(next(clock)))
    with watching() as watch:
        for made in (100, 200):
            watch(Snapshot("making", planned=200, committed=made))
        watch(Snapshot("loading", planned=20))
        for made in (0, 20):
            watch(Snapshot("making", planned=20, committed=made))
    lines = capsys.readouterr().err.splitlines()
    speeds = [float(found[1]) for line in lines if (found := re.search(r"(\S+) images/s", line))]
    assert len(speeds) == 2
    assert all(speed > 0 for speed in speeds)
