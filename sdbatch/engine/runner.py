"""Running a job: plan or resume, subtract what is committed, have the rest made."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from sdbatch.engine.cluster import check_capacity, ray_session
from sdbatch.engine.generator import Receipt
from sdbatch.engine.planner import Prepared, find_plan, make_plan, prepare
from sdbatch.engine.pool import Pool
from sdbatch.engine.shards import ShardCommitter, metadata_row
from sdbatch.errors import JobFailed
from sdbatch.ledger import Job, Shard, Status, committed_shards, read_shards, read_slice, read_status
from sdbatch.prompts import from_table
from sdbatch.spec import JobSpec

#: A job is never stopped for so few failures, whatever fraction they are.
_FEW_FAILURES = 10


@dataclass(frozen=True)
class Snapshot:
    """How a run stands. ``stage``: starting, planning, loading, making, done."""

    stage: str = "starting"
    rows: int = 0  # read while planning
    planned: int = 0
    committed: int = 0  # with all that earlier runs finished
    quarantined: int = 0
    in_flight: int = 0  # made, but not committed yet
    actors: int = 0
    deaths: int = 0

    @property
    def finished(self) -> int:
        return self.committed + self.quarantined


Watch = Callable[[Snapshot], None]


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    status: Status
    images: int  # made by this run
    starting_seconds: float  # until the first model was loaded
    making_seconds: float
    deaths: int


def plan(spec: JobSpec, watch: Watch) -> tuple[Job, list[Shard]]:
    """Plan the job, or find the plan that stands."""
    prepared = prepare(spec)
    job = find_plan(prepared)
    if job is None:
        with ray_session(spec.resources):
            job = make_plan(prepared, lambda rows: watch(Snapshot("planning", rows=rows)))
    return job, read_shards(prepared.store, job)


def run(spec: JobSpec, watch: Watch) -> Outcome:
    """Bring the job to its end. The same call goes on where an earlier one stopped."""
    started = time.perf_counter()
    watch(Snapshot())
    prepared = prepare(spec)
    job = find_plan(prepared)
    done = committed_shards(prepared.store) if job is not None else set()
    if job is not None and len(done) >= job.shards:
        return Outcome(read_status(prepared.store), 0, time.perf_counter() - started, 0.0, 0)
    with ray_session(spec.resources):
        check_capacity(spec.resources)
        if job is None:
            job = make_plan(prepared, lambda rows: watch(Snapshot("planning", rows=rows)))
        return _make(prepared, job, done, started, watch)


def _make(prepared: Prepared, job: Job, done: set[int], started: float, watch: Watch) -> Outcome:
    spec = prepared.located
    shards = read_shards(prepared.store, job)
    todo = [shard for shard in shards if shard.number not in done]
    before = sum(shard.count for shard in shards) - sum(shard.count for shard in todo)
    now = Snapshot("loading", planned=job.planned, committed=before)
    for receipt in _commit_faulty(prepared, job, [shard for shard in todo if not shard.makeable]):
        now = replace(now, quarantined=now.quarantined + receipt.quarantined)
    watch(now)

    made = failed = 0
    allowed = max(spec.failures.max_failed_fraction * job.planned, _FEW_FAILURES)

    def look(images: int, ready: int, deaths: int) -> None:
        nonlocal now
        stage = "making" if ready else "loading"
        now = replace(now, stage=stage, in_flight=max(images - made, 0), actors=ready, deaths=deaths)
        watch(now)

    pool = Pool(spec, job, look)
    for receipt in pool.run(shard for shard in todo if shard.makeable):
        made += receipt.committed + receipt.quarantined
        failed += receipt.failed_making
        now = replace(
            now,
            stage="making",
            committed=now.committed + receipt.committed,
            quarantined=now.quarantined + receipt.quarantined,
            in_flight=max(now.in_flight - receipt.committed - receipt.quarantined, 0),
        )
        watch(now)
        if failed > allowed:
            raise JobFailed(
                f"{failed} images failed while being made, more than failures.max_failed_fraction "
                f"({spec.failures.max_failed_fraction:g}) allows; see 'sdbatch errors {prepared.store.uri}'"
            )
    ended = time.perf_counter()
    ready_at = pool.ready_at or ended
    watch(replace(now, stage="done"))
    return Outcome(read_status(prepared.store), made, ready_at - started, ended - ready_at, now.deaths)


def _commit_faulty(prepared: Prepared, job: Job, shards: list[Shard]) -> Iterator[Receipt]:
    """Commit the shards of requests that were refused at plan time: there is nothing to make."""
    committer = ShardCommitter(prepared.store, prepared.located, job, job.versions)
    for shard in shards:
        table = read_slice(prepared.store, job, shard.slice).slice(shard.offset, shard.count)
        requests = from_table(table)
        rows = [metadata_row(job, shard.number, request, error=request.fault) for request in requests]
        record = committer.finish_started(shard) or committer.commit(shard, rows, [], {}, writer="driver")
        yield Receipt(shard.number, record.committed, record.quarantined, 0, 0)
