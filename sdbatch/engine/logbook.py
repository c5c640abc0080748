"""The logbook: where each actor is at work, told to a process that outlives it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@dataclass(frozen=True)
class Mark:
    """What a model is at: the batch that begins at ``position`` of a shard, or the one request there."""

    stem: str  # the shard's
    position: int
    alone: bool


class Logbook:
    """The last mark of each actor. A small Ray actor beside the driver; its own death costs only the marks of now."""

    def __init__(self) -> None:
        self._marks: dict[int, Mark | None] = {}
        self._kept = 0

    def write(self, actor: int, mark: Mark | None) -> None:
        """``None``: its model rests."""
        self._marks[actor] = mark

    def kept(self) -> None:
        """A batch will outlive its maker."""
        self._kept += 1

    def last(self, actor: int) -> tuple[Mark | None, int]:
        """An actor's last mark, and how many batches were kept by all."""
        return self._marks.get(actor), self._kept


class Pen:
    """What an actor writes in the logbook with. Without a logbook nothing is written."""

    def __init__(self, logbook: Any = None, actor: int = 0) -> None:
        self._logbook, self._actor = logbook, actor

    def at(self, mark: Mark | None) -> None:
        """Returns when it is written."""
        if self._logbook is not None:
            ray.get(self._logbook.write.remote(self._actor, mark))

    def kept(self) -> None:
        if self._logbook is not None:
            self._logbook.kept.remote()


def open_logbook() -> Any:
    """A new logbook on this process's node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options: dict[str, Any] = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    remote: Any = ray.remote(**options)(Logbook)
    return remote.remote()
