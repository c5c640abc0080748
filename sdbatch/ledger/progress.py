"""How far a job is, read from the ledger alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sdbatch.ledger.commits import CommitRecord, read_commits
from sdbatch.ledger.plan import Job, read_job
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
    """The status of the job in this output. Raises OutputError where there is none."""
    return summarise(store.uri, read_job(store), read_commits(store))


def summarise(uri: str, job: Job, records: Iterable[CommitRecord]) -> Status:
    committed = quarantined = size = done = 0
    seconds = 0.0
    for record in records:
        done += 1
        committed += record.committed
        quarantined += record.quarantined
        size += record.bytes
        seconds += record.seconds.get("model", 0.0)
    state = "complete" if done == job.shards else "incomplete" if done else "planned"
    return Status(
        name=job.spec["name"],
        output=uri,
        state=state,
        planned=job.planned,
        committed=committed,
        quarantined=quarantined,
        shards=job.shards,
        shards_committed=done,
        bytes=size,
        model_seconds=round(seconds, 3),
    )


def failures(store: Store) -> list[dict[str, Any]]:
    """Every quarantined request: shard, image_id, error."""
    read_job(store)
    return [{"shard": record.shard, **failure} for record in read_commits(store) for failure in record.failures]
