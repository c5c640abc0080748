"""How a run stands, as it is told about once a second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdbatch.engine.making.pool import Worker


@dataclass(frozen=True)
class Snapshot:
    """How a run stands. ``stage``: starting, waiting (for what, is in ``note``), planning, loading, making, done."""

    stage: str = "starting"
    rows: int = 0  # read while planning
    planned: int = 0
    committed: int = 0  # with all that earlier runs finished
    quarantined: int = 0
    in_flight: int = 0  # made, but not committed yet
    actors: int = 0  # whose model is loaded
    crew: tuple[Worker, ...] = ()  # they and those that still load
    deaths: int = 0
    note: str = ""

    @property
    def finished(self) -> int:
        return self.committed + self.quarantined


Watch = Callable[[Snapshot], None]
