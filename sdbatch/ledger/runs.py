"""What runs took: one object a driver, written anew with its looks at the pool, by that driver alone.

    _sdbatch/runs/0000001.json   actor-seconds, images, batches, bytes, speeds, the estimate it began with, how it ended

What a job has cost is the sum over all of them, so it outlives kills and resumes. A driver that was killed wrote its
last line some seconds before: :attr:`Run.charged_seconds` makes up for them.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sdbatch.errors import StorageError
from sdbatch.storage import Store

_PREFIX = "_sdbatch/runs/"
#: Seconds between two lines of a driver; so long, at most, its actors worked on unseen.
LINE = 5.0


@dataclass(frozen=True)
class Run:
    """What one driver's work took so far. ``ended``: complete, failed, interrupted, budget spent; empty at work."""

    number: int = 0
    host: str = field(default_factory=platform.node)
    started_at: float = field(default_factory=lambda: round(time.time(), 3))  # seconds since 1970
    updated_at: float = 0.0
    ended: str = ""
    actors: int = 0  # that have a process, when last looked at
    actor_seconds: float = 0.0  # of all its actors' processes, idle or not
    wall_seconds: float = 0.0
    gpus_per_actor: float = 0.0
    usd_per_actor_hour: float | None = None
    images: int = 0  # that it committed; of shards that it mended those that it made
    batches: int = 0
    bytes: int = 0
    deaths: int = 0
    device: str = ""  # that its pictures were made on; empty before the first model is loaded
    conditions: dict[str, Any] = field(default_factory=dict)  # what speeds were measured under
    speeds: dict[str, Any] = field(default_factory=dict)
    estimate: dict[str, Any] | None = None

    @property
    def charged_seconds(self) -> float:
        """Actor-seconds to pay for: a driver that never said how it ended had actors at work until its next line."""
        return self.actor_seconds + (0.0 if self.ended else self.actors * LINE)

    @property
    def gpu_hours(self) -> float:
        return self.charged_seconds * self.gpus_per_actor / 3600

    def usd(self, usd_per_actor_hour: float | None = None) -> float:
        """What it cost; a run that knew no price is charged at the one given."""
        price = self.usd_per_actor_hour if self.usd_per_actor_hour is not None else usd_per_actor_hour
        return self.charged_seconds * (price or 0.0) / 3600


def begin_run(store: Store, run: Run) -> Run:
    """Put down that a run begins; returns it with its number."""
    number = max((_number(entry.key) for entry in store.list(_PREFIX)), default=0) + 1
    while not store.put_if_absent(_key(number), _json(begun := replace(run, number=number))):
        number += 1
    return begun


def put_run(store: Store, run: Run) -> None:
    """Write the run's line anew."""
    store.put(_key(run.number), _json(replace(run, updated_at=round(time.time(), 3))))


def read_runs(store: Store) -> list[Run]:
    """All runs of an output, in the order in which they began."""
    return [_read(store, entry.key) for entry in store.list(_PREFIX)]


def spent_usd(runs: Iterable[Run], usd_per_actor_hour: float | None) -> float:
    """What the runs cost together."""
    return sum(run.usd(usd_per_actor_hour) for run in runs)


def dollars(usd: float) -> str:
    """An amount for people: cents, or three digits of what is less than a dollar."""
    digits = 2 if usd >= 1 or usd <= 0 else min(2 - math.floor(math.log10(usd)), 9)
    return f"${usd:,.{digits}f}"


def _read(store: Store, key: str) -> Run:
    try:
        return Run(**json.loads(store.get(key)))
    except (ValueError, TypeError) as error:
        raise StorageError(
            f"{store.uri}/{key} is damaged: {error}; remove it to go on without what that run took"
        ) from None


def _json(run: Run) -> bytes:
    return json.dumps(asdict(run), sort_keys=True).encode()


def _number(key: str) -> int:
    return int(key.removeprefix(_PREFIX).removesuffix(".json"))


def _key(number: int) -> str:
    return f"{_PREFIX}{number:07d}.json"
