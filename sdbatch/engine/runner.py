"""Running a job: plan or resume, subtract what is committed, have the rest made."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pyarrow as pa

from sdbatch.dataset import write_job_card
from sdbatch.engine.account import Account, Bill, check_budget, keeping_account
from sdbatch.engine.cluster import await_room, ray_session
from sdbatch.engine.costs.speeds import shape_of
from sdbatch.engine.forecast import Forecast, forecast
from sdbatch.engine.live import Live
from sdbatch.engine.making.collector import Collector
from sdbatch.engine.making.generator import Receipt
from sdbatch.engine.making.metrics import DriverMetrics
from sdbatch.engine.making.pool import Pool, Worker
from sdbatch.engine.making.shards import Ended, ShardCommitter, metadata_row
from sdbatch.engine.planning.planner import (
    Prepared,
    extend_plan,
    find_plan,
    first_requests,
    input_changed,
    make_plan,
    prepare,
)
from sdbatch.engine.snapshot import Snapshot, Watch
from sdbatch.engine.webhook import check_notify, telling
from sdbatch.errors import BudgetSpent
from sdbatch.ledger import (
    Commits,
    Job,
    Shard,
    Shards,
    Status,
    hold_lease,
    newest_round,
    read_shards,
    read_slice,
    read_status,
    read_totals,
)
from sdbatch.prompts import ImageRequest, from_table
from sdbatch.spec import JobSpec, overridden

#: A job is never stopped for so few failures, whatever fraction they are.
_FEW_FAILURES = 10
#: Shards without anything to make that are committed at once: each waits for the store a few times.
_COMMITTERS = 16


#: Raises OutputError once another driver has taken over.
Check = Callable[[], None]


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    status: Status
    images: int  # made by this run
    batches: int  # that the model computed for them
    starting_seconds: float  # until the first model was loaded
    making_seconds: float
    deaths: int
    added: int = 0  # images that were planned by this run
    bill: Bill = field(default_factory=Bill)


@dataclass(frozen=True)
class Planned:
    """A plan as it stands: how many of its images were planned just now, what the rest will take, and the first images,
    if asked for."""

    job: Job
    shards: Shards
    added: int
    forecast: Forecast
    first: list[ImageRequest]


def plan(spec: JobSpec, watch: Watch, *, extend: bool = False, show: int = 0, calibrate: bool = False) -> Planned:
    """Plan the job, or find the plan that stands; with ``extend`` plan the rows that the table has grown by.

    With ``calibrate`` its speed is measured first. The first ``show`` requests, in the order of the table, are part of
    the result.
    """
    prepared = prepare(spec)
    standing = job = find_plan(prepared, extend)
    first = list[ImageRequest]()
    if job is None or show or (extend and input_changed(prepared, job)):
        with ray_session(spec.resources):
            if job is None or (extend and input_changed(prepared, job)):
                job = _plan(prepared, job, watch)
            first = first_requests(prepared, show) if show else []
    shards = read_shards(prepared.store, job)
    return Planned(job, shards, _added(standing, job), forecast(prepared, job, shards, measure=calibrate), first)


def _plan(prepared: Prepared, standing: Job | None, watch: Watch) -> Job:
    def on_rows(rows: int) -> None:
        watch(Snapshot("planning", rows=rows))

    return make_plan(prepared, on_rows) if standing is None else extend_plan(prepared, standing, on_rows)


def _added(before: Job | None, now: Job) -> int:
    return now.planned - (0 if before is None else before.planned)


def run(spec: JobSpec, watch: Watch, *, extend: bool = False) -> Outcome:
    """Bring the job to its end. The same call goes on where an earlier one stopped.

    With ``extend`` the rows that the table has grown by are planned first. Raises OutputError while another driver is
    at work on the output.
    """
    started = time.perf_counter()
    watch(Snapshot())
    check_notify(spec.notify)
    prepared = prepare(spec)
    standing = job = find_plan(prepared, extend)
    grown = extend and job is not None and input_changed(prepared, job)
    if job is not None and not grown and (status := read_status(prepared.store)).state == "complete":
        write_job_card(prepared.store, job, prepared.spec)
        return Outcome(status, 0, 0, time.perf_counter() - started, 0.0, 0)
    with telling(spec, prepared.store), driving(prepared, watch) as (watch, check):
        began = time.perf_counter()
        if job is None or grown:
            job = _plan(prepared, job, watch)
        outcome = finish(prepared, job, watch, check, started, time.perf_counter() - began)
        return replace(outcome, added=_added(standing, job))


@contextmanager
def driving(prepared: Prepared, watch: Watch) -> Iterator[tuple[Watch, Check]]:
    """The output's lease, and Ray with room for an actor. Yields a watch that others can follow, too.

    Raises BudgetSpent where no money is left.
    """
    check_budget(prepared.store, prepared.spec.resources)
    live = Live(watch)
    with (
        hold_lease(prepared.store, lambda told: watch(Snapshot("waiting", note=told)), live.tell) as check,
        ray_session(prepared.spec.resources),
    ):

        def on_wait(told: str) -> None:
            check()
            live(Snapshot("waiting", note=told))

        await_room(prepared.spec.resources, on_wait)
        yield live, check


def finish(prepared: Prepared, job: Job, watch: Watch, check: Check, started: float, planning: float = 0.0) -> Outcome:
    """Make what was never made, then what the newest round asks to be made again.

    ``planning``: seconds of those since ``started`` that only this run had to take.
    """
    with keeping_account(prepared, job, started, planning) as account:
        making = _Making(prepared, job, watch, check, account)
        shards, again = read_shards(prepared.store, job), newest_round(prepared.store)
        making.edition(shards, prepared.located, 1)
        if again is not None:
            chosen = shards.where(np.isin(shards.column("number"), list(again.shards)))
            changed = replace(prepared, spec=overridden(prepared.spec, again.changed))
            making.edition(chosen, changed.located, again.edition)
        outcome = making.outcome(started)
    if outcome.status.state == "complete":
        write_job_card(prepared.store, job, prepared.spec)
    return outcome


class _Making:
    """Shards on their way through the pool, counted."""

    def __init__(self, prepared: Prepared, job: Job, watch: Watch, check: Check, account: Account) -> None:
        self._account = account
        self._store, self._job, self._watch, self._check = prepared.store, job, watch, check
        totals = read_totals(prepared.store)
        self._now = Snapshot("loading", 0, job.planned, totals.committed, totals.quarantined)
        self._made = self._failed = self._batches = self._deaths_before = 0
        self._through = 0  # of the edition in work
        self._ready_at: float | None = None
        self._metrics = DriverMetrics(prepared.spec.name, job.model_name)

    def edition(self, shards: Shards, spec: JobSpec, edition: int) -> None:
        """Have all of the shards made that are not there in this edition."""
        with Collector(self._store, shards, Commits(self._store), edition) as collector:
            todo, self._through = collector.todo, 0
            if not len(todo):
                return
            if edition > 1:  # counted by themselves: they are committed already
                self._now = Snapshot("loading", planned=todo.images, deaths=self._now.deaths)
            self._watch(self._now)
            for receipt in self._commit_faulty(spec, todo.makeable(False), edition):
                self._count(receipt, spec)
                collector.committed(receipt.shard)
            self._deaths_before = self._now.deaths
            makeable = todo.makeable()
            if edition == 1:
                self._account.expect(makeable)
            pool = Pool(spec, self._job, self._look, self._account.purse(makeable))
            self._account.follow(pool)
            with closing(pool.run(_in_edition(edition, makeable))) as receipts:  # no actor outlives an error
                for receipt in receipts:
                    through = receipt.committed + receipt.quarantined
                    self._through += through
                    self._made += through if edition == 1 else receipt.made  # the rest of it was carried over
                    self._account.count(receipt, edition)
                    self._count(receipt, spec)
                    collector.committed(receipt.shard)
            self._ready_at = self._ready_at or pool.ready_at
            if pool.stopped and self._now.finished < self._now.planned:
                raise self._account.out_of_money(self._now.planned - self._now.finished)

    def outcome(self, started: float) -> Outcome:
        ended = time.perf_counter()
        ready_at = self._ready_at or ended
        self._watch(replace(self._now, stage="done"))
        status = read_status(self._store)
        return Outcome(
            status,
            self._made,
            self._batches,
            ready_at - started,
            ended - ready_at,
            self._now.deaths,
            bill=self._account.bill(),
        )

    def _look(self, images: int, crew: tuple[Worker, ...], deaths: int) -> None:
        """What the pool tells about once a second."""
        self._check()
        self._account.line()
        ready = sum(worker.state != "loading" for worker in crew)
        self._metrics.look(self._now.planned, self._now.finished, ready, self._deaths_before + deaths)
        self._now = replace(
            self._now,
            stage="making" if ready else "loading",
            in_flight=max(images - self._through, 0),
            actors=ready,
            crew=crew,
            deaths=self._deaths_before + deaths,
        )
        self._watch(self._now)

    def _count(self, receipt: Receipt, spec: JobSpec) -> None:
        """A shard is done. Raises JobFailed when too much of the job has failed."""
        self._failed += receipt.failed_making
        self._batches += receipt.batches
        self._metrics.counted(receipt.committed, receipt.quarantined, receipt.batches)
        self._now = replace(
            self._now,
            committed=self._now.committed + receipt.committed,
            quarantined=self._now.quarantined + receipt.quarantined,
            in_flight=max(self._now.in_flight - receipt.committed - receipt.quarantined, 0),
        )
        self._watch(self._now)
        fraction = spec.failures.max_failed_fraction
        if self._failed > max(fraction * self._job.planned, _FEW_FAILURES):
            raise BudgetSpent(
                f"{self._failed} images failed while being made, more than failures.max_failed_fraction "
                f"({fraction:g}) allows; see 'sdbatch errors {self._store.uri}'"
            )

    def _commit_faulty(self, spec: JobSpec, shards: Shards, edition: int) -> Iterator[Receipt]:
        """Commit the shards of requests that were refused at plan time: there is nothing to make."""
        committer = ShardCommitter(self._store, spec, self._job, self._job.versions)

        def commit(table: pa.Table, shard: Shard) -> Receipt:
            rows = [
                metadata_row(self._job, shard.number, request, error=request.fault)
                for request in from_table(table.slice(shard.offset, shard.count))
            ]
            ended = [Ended(row, None) for row in rows]
            record = committer.finish_started(shard) or committer.commit(shard, ended, {}, writer="driver")[0]
            return Receipt(shard.number, record.committed, record.quarantined, 0, 0, shape_of(shard))

        with ThreadPoolExecutor(_COMMITTERS) as threads:
            for number in np.unique(shards.column("slice")):
                self._check()
                table = read_slice(self._store, self._job, int(number))
                yield from threads.map(partial(commit, table), _in_edition(edition, shards.of_slice(int(number))))


def _in_edition(edition: int, shards: Iterable[Shard]) -> Iterator[Shard]:
    return (replace(shard, edition=edition) for shard in shards)
