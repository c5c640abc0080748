"""How far a job is and how fast it goes, read from the ledger alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from sdbatch.ledger.commits import CommitRecord, Commits, Totals, read_sums, read_totals
from sdbatch.ledger.lease import Driver, read_driver
from sdbatch.ledger.plan import Job, find_job, read_job
from sdbatch.ledger.rounds import newest_round
from sdbatch.storage import Store

#: Records that tell a job's speed: at most so many, and so few that their ends alone tell little.
_NEWEST, _FEW = 64, 8
#: What between two of them is a pause: so many times the median, and seconds.
_PAUSE_TIMES, _PAUSE_SECONDS = 20, 60.0


@dataclass(frozen=True)
class Status:
    """Counts of a job. ``state``: planned (nothing done yet), incomplete, complete; planning while there is no plan."""

    name: str
    output: str
    state: str
    planned: int
    committed: int
    quarantined: int
    shards: int
    shards_committed: int
    bytes: int
    model_seconds: float
    dropped: int = 0  # of the quarantined, those that checks dropped

    @property
    def remaining(self) -> int:
        return self.planned - self.committed - self.quarantined

    @property
    def failed(self) -> int:
        """Of the quarantined, those that were not to be: all but what checks dropped."""
        return self.quarantined - self.dropped


@dataclass(frozen=True)
class Progress:
    """A job's status, its speed, why requests are quarantined, and who is at work."""

    status: Status
    images_per_second: float  # lately; 0 where nothing can be told
    reasons: Mapping[str, int]
    driver: Driver | None

    @property
    def at_work(self) -> bool:
        return self.driver is not None and self.driver.state == "alive"

    @property
    def seconds_left(self) -> float | None:
        """None where nobody can tell."""
        made = self.status.remaining - (int(self.driver.now.get("in_flight", 0)) if self.at_work and self.driver else 0)
        return max(made, 0) / self.images_per_second if self.images_per_second and self.status.remaining else None


def read_status(store: Store) -> Status:
    """The status of the job in this output. Raises OutputError where there is none.

    Reads a few kilobytes, however large the job: sums, and the records of slices that are being made.
    """
    return _status(store, read_job(store), read_totals(store))


def read_progress(store: Store) -> Progress:
    """The status and all that goes with it, from as little.

    While a driver makes the first plan there is no job yet, not even a name: all counts are 0 then. Raises OutputError
    where there is neither.
    """
    job = find_job(store)
    if job is None:
        driver = read_driver(store)
        if driver is not None and driver.state in {"alive", "silent"}:
            return Progress(Status("", store.uri, "planning", 0, 0, 0, 0, 0, 0, 0.0), 0.0, {}, driver)
        job = read_job(store)
    totals, recent = read_sums(store)
    status, driver = _status(store, job, totals), read_driver(store)
    told = driver.now.get("images_per_second") if driver is not None and driver.state == "alive" else None
    rate = float(told) if isinstance(told, int | float) and told > 0 else images_per_second(recent)
    return Progress(status, round(rate, 3), totals.reasons, driver)


def images_per_second(records: Sequence[CommitRecord]) -> float:
    """How fast images were finished lately, since the last pause; 0 where the records don't tell.

    ``records`` are in the order of their ends. Of an edition after the first only what it has more counts: the rest was
    carried over.
    """
    newest = [record for record in records if record.seconds][-_NEWEST:]  # what the driver refused took no time
    gaps = [after.finished_at - before.finished_at for before, after in pairwise(newest)]
    if not gaps:
        return 0.0
    pause = max(_PAUSE_TIMES * median(gaps), _PAUSE_SECONDS)
    first = max((place for place, gap in enumerate(gaps, 1) if gap > pause), default=0)
    if len(newest) - first < _FEW:  # at a beginning, where shards that were made side by side end together
        images, began = newest[first:], min(one.finished_at - one.seconds.get("shard", 0.0) for one in newest[first:])
    else:
        images, began = newest[first + 1 :], newest[first].finished_at
    seconds = newest[-1].finished_at - began
    made = sum(max(record.committed - record.replaced.get("committed", 0), 0) for record in images)
    return made / seconds if seconds > 0 else 0.0


def _status(store: Store, job: Job, totals: Totals) -> Status:
    again = newest_round(store)
    finished = again is None or again.finished(Commits(store))
    whole = totals.shards == job.shards and finished
    return Status(
        name=job.spec["name"],
        output=store.uri,
        state="complete" if whole else "incomplete" if totals.shards else "planned",
        planned=job.planned,
        committed=totals.committed,
        quarantined=totals.quarantined,
        shards=job.shards,
        shards_committed=totals.shards,
        bytes=totals.bytes,
        model_seconds=totals.model_seconds,
        dropped=totals.dropped,
    )


def failures(store: Store) -> list[dict[str, Any]]:
    """Every quarantined request: shard, image_id, error."""
    read_job(store)
    return [{"shard": record.shard, **failure} for record in Commits(store).newest() for failure in record.failures]
