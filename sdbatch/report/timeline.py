"""Progress and throughput over the time that a job was worked on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from sdbatch.ledger import CommitRecord

_MOST_BINS = 120
_RECORDS_A_BIN = 2
#: What between two commits is a pause: so many times the median, and seconds.
_PAUSE_TIMES, _PAUSE_SECONDS = 20, 60.0


def timeline(records: Sequence[CommitRecord]) -> dict[str, Any]:
    """Images committed in equal spans of working time, and the pauses that are left out: where, and seconds."""
    timed = sorted((record for record in records if record.seconds), key=lambda record: record.finished_at)
    if not timed:
        return {"seconds": 0.0, "images": [], "pauses": [], "began": 0.0, "ended": 0.0}
    gaps = [after.finished_at - before.finished_at for before, after in pairwise(timed)]
    pause = max(_PAUSE_TIMES * median(gaps), _PAUSE_SECONDS) if gaps else _PAUSE_SECONDS
    at = [timed[0].seconds.get("shard", 1.0)]
    pauses = []
    for gap, record in zip(gaps, timed[1:], strict=True):
        worked = record.seconds.get("shard", 1.0)
        if gap > pause and gap > worked:
            pauses.append([round(at[-1], 3), round(gap - worked, 1)])
            gap = worked
        at.append(at[-1] + gap)
    count = min(_MOST_BINS, max(len(timed) // _RECORDS_A_BIN, 1))
    images = [0] * count
    for when, record in zip(at, timed, strict=True):
        images[max(math.ceil(round(when / at[-1] * count, 6)) - 1, 0)] += record.committed if record.edition == 1 else 0
    began = timed[0].finished_at - timed[0].seconds.get("shard", 0.0)
    return {
        "seconds": round(at[-1], 3),
        "images": images,
        "pauses": pauses,
        "began": round(began, 1),
        "ended": round(timed[-1].finished_at, 1),
    }
