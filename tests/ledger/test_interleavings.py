"""Any order of puts, commits, crashes, resumptions and collections, by writers who know nothing of each other.

Writers run in threads that stop before every operation on the store; a state machine decides who goes next, who dies
and what begins. Each writer's pictures have a colour of their own, as those of different GPUs would.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from sdbatch.engine.making.shards import Ended, ShardCommitter
from sdbatch.ledger import (
    Again,
    Commits,
    Round,
    Shard,
    collect,
    commits,
    newest_round,
    put_round,
    put_totals,
    read_totals,
)
from sdbatch.storage import Entry, LocalStore, Store, transfers
from tests.ledger.planned import Planned


class Crash(BaseException):
    """Kills a writer wherever it stands."""


class Writer(Store):
    """A process of its own, as the store sees it: each operation waits until it is this writer's turn."""

    def __init__(self, store: Store, work: Callable[[Store], Any]) -> None:
        self.uri, self._store = store.uri, store
        self._turn, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._dying = False
        self.ended = False
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()
        self._stopped.acquire()

    def step(self) -> None:
        """One operation, up to the next one."""
        if not self.ended:
            self._turn.release()
            self._stopped.acquire()

    def kill(self) -> None:
        self._dying = True
        while not self.ended:
            self.step()

    def finish(self) -> None:
        while not self.ended:
            self.step()

    def _run(self, work: Callable[[Store], Any]) -> None:
        try:
            work(self)
        except Crash:
            pass
        except BaseException as error:
            self.error = error
        self.ended = True
        self._stopped.release()

    def _wait(self) -> Store:
        self._stopped.release()
        self._turn.acquire()
        if self._dying:
            raise Crash
        return self._store

    def get(self, key: str) -> bytes:
        return self._wait().get(key)

    def fetch(self, key: str, path: Path) -> None:
        self._wait().fetch(key, path)

    def put(self, key: str, data: bytes) -> None:
        self._wait().put(key, data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        return self._wait().put_if_absent(key, data)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        return self._wait().list(prefix)

    def delete(self, key: str) -> None:
        self._wait().delete(key)

    def version(self, key: str) -> str:
        return self._wait().version(key)

    def clock(self, key: str) -> float:
        return self._wait().clock(key)

    def exists(self, key: str) -> bool:
        return self._wait().exists(key)


class Interleavings(RuleBasedStateMachine):
    writers = Bundle("writers")

    @initialize(form=st.sampled_from(["images", "webdataset"]))
    def plan(self, form: str) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.planned = Planned(LocalStore(self.folder.name), form, slices=2)
        self.store = self.planned.store
        self.alive: list[Writer] = []
        self.colours = iter(range(0, 240, 5))

    @rule(target=writers, number=st.integers(0, 7), fails=st.booleans())
    def begin_shard(self, number: int, fails: bool) -> Any:
        shard, colour = self.planned.shards[number], next(self.colours, 200)
        again = newest_round(self.store)
        if again is not None and number in again.shards:
            shard = replace(shard, edition=again.edition)
        elif (shard.number, 1) in _done(self.store, self.planned):
            return multiple()  # a driver hands out what it finds undone
        failing = (1,) if fails and shard.edition == 1 else ()
        return self._begin(lambda store: self._make(store, shard, colour, failing))

    @rule(target=writers, number=st.integers(0, 1))
    def begin_collection(self, number: int) -> Any:
        def work(store: Store) -> None:
            collect(store, number, 1, [shard.number for shard in self.planned.shards if shard.slice == number])
            put_totals(store)

        return self._begin(work)

    @rule(positions=st.sets(st.integers(0, 0), min_size=1), kind=st.sampled_from(["retry", "repair"]))
    def begin_round(self, positions: set[int], kind: str) -> None:
        last, found = newest_round(self.store), Commits(self.store)
        if last is not None and not last.finished(found):
            return
        edition = 2 if last is None else last.edition + 1
        shards = {
            record.shard: Again(record.slice, record.edition, tuple(positions))
            for record in list(found.newest())[:2]
            if self.planned.shards[record.shard].makeable
        }
        if shards:
            put_round(self.store, Round(edition, kind, (), shards))

    @rule(writer=writers, steps=st.integers(1, 12))
    def go_on(self, writer: Writer, steps: int) -> None:
        for _ in range(steps):
            writer.step()

    @rule(writer=consumes(writers))
    def die(self, writer: Writer) -> None:
        writer.kill()

    @rule()
    def resume(self) -> None:
        """A driver that makes what is undone, while others may still be at work."""
        for shard in self.planned.shards:
            if (shard.number, 1) not in _done(self.store, self.planned):
                self._make(self.store, shard, next(self.colours, 200), ())

    @invariant()
    def what_is_committed_is_there(self) -> None:
        if not hasattr(self, "planned"):
            return
        assert not [writer.error for writer in self.alive if writer.error is not None]
        verdict = self.planned.verdict()
        assert verdict.doubled == verdict.altered == []
        done = {record.shard for record in Commits(self.store).newest()}
        undone = [shard for shard in self.planned.shards if shard.number not in done]
        assert len(verdict.missing) == sum(shard.count for shard in undone)
        totals = read_totals(self.store)
        assert (totals.shards, totals.committed, totals.quarantined) == (
            len(done),
            verdict.committed,
            verdict.quarantined,
        )

    def teardown(self) -> None:
        if not hasattr(self, "planned"):
            return
        for writer in self.alive:
            writer.kill()
        self.resume()
        again = newest_round(self.store)
        for number in again.shards if again is not None else ():
            assert again is not None
            self._make(self.store, replace(self.planned.shards[number], edition=again.edition), 220, ())
        for number in (0, 1):
            collect(self.store, number, 1, [shard.number for shard in self.planned.shards if shard.slice == number])
        put_totals(self.store)
        verdict = self.planned.verdict()
        assert verdict.ok
        assert (
            verdict.planned
            == verdict.committed + verdict.quarantined
            == read_totals(self.store).committed + (read_totals(self.store).quarantined)
        )
        self.folder.cleanup()

    def _begin(self, work: Callable[[Store], Any]) -> Writer:
        self.alive.append(Writer(self.store, work))
        return self.alive[-1]

    def _make(self, store: Store, shard: Shard, colour: int, failing: tuple[int, ...]) -> None:
        """What an actor does with a shard, but for the model."""
        committer = ShardCommitter(store, self.planned.spec, self.planned.job, {})
        if committer.finish_started(shard) is not None:
            return
        ended = self.planned.ended(shard, colour, failing)
        settled = committer.carried_over(shard)
        for position, data in committer.writer.kept(shard.stem).items():
            settled[position] = Ended(ended[position].row, replace(_picture(ended[position]), data=data))
        new = [_picture(end) for position, end in enumerate(ended) if position not in settled and end.picture]
        kept = {one.position: one for one in committer.writer.keep(shard.stem, new, last=False)}
        for position, end in enumerate(ended):
            settled.setdefault(position, Ended(end.row, kept.get(position)))
        committer.commit(shard, [end for _, end in sorted(settled.items())], {"model": 1.0}, "w")


def _picture(end: Ended) -> Any:
    return end.picture


def _done(store: Store, planned: Planned) -> set[tuple[int, int]]:
    found = Commits(store)
    collected = {
        (shard.number, 1)
        for shard in planned.shards
        for of, edition in found.collected
        if (shard.slice, 1) == (of, edition)
    }
    return set(found.single) | collected


@pytest.fixture(autouse=True)
def one_thread_a_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a writer's operations come in one order."""
    monkeypatch.setattr(transfers, "_POOL", SimpleNamespace(map=map))
    monkeypatch.setattr(commits, "_READERS", 1)


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=15, stateful_step_count=25)
