"""Ray tasks that share the cluster with Ray Data, a bounded number at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from sdbatch.errors import JobFailed, SdbatchError

#: Tasks ask for no CPU. Those who read the table hold theirs until what they have read is taken, and it is taken
#: only when a task is through: one that waited for a CPU might wait for ever.
TASK: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": "SPREAD"}
#: More at once would not be faster: one driver reads the table for all of them, and what it has read waits in memory.
_MOST = 64


def at_once() -> int:
    """How many tasks run at once: as many as the cluster has CPUs, within bounds."""
    return min(max(int(ray.cluster_resources().get("CPU", 1)), 1), _MOST)  # type: ignore[no-untyped-call]


def in_order(started: Iterator[ray.ObjectRef[Any]]) -> Iterator[Any]:
    """The results of tasks in the order in which they are started; the next starts when the oldest is through."""
    running = deque(islice(started, at_once()))
    while running:
        yield result_of(running.popleft())
        running.extend(islice(started, 1))


def result_of(ref: ray.ObjectRef[Any], doing: str = "planning") -> Any:
    """What a task returns. Raises our own errors as they were raised there, and JobFailed for any other end."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, SdbatchError):
            raise error.cause from None
        raise JobFailed(f"{doing} failed: {type(error.cause).__name__}: {error.cause}") from None
    except RayError as error:
        raise JobFailed(f"{doing} failed: {' '.join(str(error).split())}") from None
