"""How far a job is, read from the ledger alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sdbatch.ledger.commits import Commits, read_totals
from sdbatch.ledger.plan import read_job
from sdbatch.ledger.rounds import newest_round
from sdbatch.storage import Store


@dataclass(frozen=True)
class Status:
    """Counts of a job. ``state``: planned (nothing done yet), incomplete, complete."""

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

    @property
    def remaining(self) -> int:
        return self.planned - self.committed - self.quarantined


def read_status(store: Store) -> Status:
    """The status of the job in this output. Raises OutputError where there is none.

    Reads a few kilobytes, however large the job: sums, and the records of slices that are being made.
    """
    job, again = read_job(store), newest_round(store)
    finished = again is None or again.finished(Commits(store))
    totals = read_totals(store)
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
    )


def failures(store: Store) -> list[dict[str, Any]]:
    """Every quarantined request: shard, image_id, error."""
    read_job(store)
    return [{"shard": record.shard, **failure} for record in Commits(store).newest() for failure in record.failures]
