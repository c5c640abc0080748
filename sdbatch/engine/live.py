"""What a driver tells with its heartbeat, for whoever watches from another machine."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import asdict
from typing import Any

from sdbatch.engine.snapshot import Snapshot, Watch

#: Seconds that speed is measured over, and actors that are told of one by one.
_WINDOW = 60.0
_MOST_TOLD = 64


class Live:
    """Passes snapshots on to a watch and knows the last one."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._last: dict[str, Any] = {}
        self._made = deque[tuple[float, int]]()

    def __call__(self, now: Snapshot) -> None:
        """A watch itself."""
        self._watch(now)
        self._last = {
            "stage": now.stage,
            "note": now.note,
            "rows": now.rows,
            "committed": now.committed,
            "quarantined": now.quarantined,
            "in_flight": now.in_flight,
            "actors": now.actors,
            "deaths": now.deaths,
            "workers": len(now.crew),
            "crew": [asdict(worker) for worker in now.crew[:_MOST_TOLD]],
            "images_per_second": self._speed(now),
        }

    def tell(self) -> dict[str, Any]:
        """The last snapshot, for the ledger."""
        return self._last

    def _speed(self, now: Snapshot) -> float:
        """Images a second over the last minute; what is made counts before it is committed."""
        if now.stage != "making":
            self._made.clear()
            return 0.0
        done, when = now.finished + now.in_flight, time.monotonic()
        if self._made and done < self._made[-1][1]:  # who died took what it had made along
            self._made.clear()
        self._made.append((when, done))
        while when - self._made[0][0] > _WINDOW:
            self._made.popleft()
        first, before = self._made[0]
        return round((done - before) / (when - first), 3) if when - first > 1 else 0.0
