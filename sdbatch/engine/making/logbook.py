"""The logbook: where each actor is at work, told to a process that outlives it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sdbatch.engine.models.turns import Desk, Turns


@dataclass(frozen=True)
class Mark:
    """What a model is at: the batch that begins at ``position`` of a shard, or the one request there."""

    stem: str  # the shard's
    position: int
    alone: bool


class Logbook:
    """The last mark of each actor, and who compiles. A small Ray actor beside the driver; its own death costs only the
    marks of now."""

    def __init__(self, compiled: Mapping[str, str]) -> None:
        self._marks: dict[int, Mark | None] = {}
        self._kept = 0
        self._turns = Turns(compiled)

    def write(self, actor: int, mark: Mark | None) -> None:
        """``None``: its model rests."""
        self._marks[actor] = mark

    def kept(self) -> None:
        """A batch will outlive its maker."""
        self._kept += 1

    def last(self, actor: int) -> tuple[Mark | None, int]:
        """The last mark of an actor that is gone, and how many batches were kept by all."""
        self._turns.leave(actor)
        return self._marks.get(actor), self._kept

    def turn(self, actor: int, key: str) -> str | None:
        return self._turns.ask(actor, key)

    def turn_done(self, actor: int, key: str, sha256: str) -> None:
        self._turns.done(actor, key, sha256)

    def compiled(self) -> dict[str, str]:
        """Shape's key → checksum of what there is."""
        return self._turns.known


class Pen(Desk):
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

    def turn(self, key: str) -> str | None:
        return super().turn(key) if self._logbook is None else ray.get(self._logbook.turn.remote(self._actor, key))

    def turn_done(self, key: str, sha256: str) -> None:
        if self._logbook is not None:
            ray.get(self._logbook.turn_done.remote(self._actor, key, sha256))


def open_logbook(compiled: Mapping[str, str]) -> Any:
    """A new logbook on this process's node; ``compiled``: what is known of code for this output."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options: dict[str, Any] = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    remote: Any = ray.remote(**options)(Logbook)
    return remote.remote(compiled)
