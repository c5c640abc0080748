"""Threads that encode and store batches beside the model: as many as keep up with it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

#: Threads to begin with, before anything was measured, and at most.
_FIRST, _MOST = 2, 16
#: Batches beyond those that keep up. What is on its way is lost with the process, and fills its memory.
_SPARE = 2
#: How much of a new measurement goes into the mean.
_FRESH = 0.3
#: Finishing may vary by so much before it falls behind.
_SLACK = 1.25


class Finishers:
    """Finishes batches in threads, as many at once as keep up with the model, by what a batch takes of each."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_MOST + _SPARE, "finisher")
        self._finishing = self._making = 0.0

    @property
    def room(self) -> int:
        """Batches that may be on their way through here."""
        return threads_needed(self._finishing, self._making) + _SPARE

    def submit(self, making: float, finish: Callable[..., Any], *given: Any) -> Future[Any]:
        """Have ``finish(*given)`` done for a batch that the model was at for ``making`` seconds."""
        self._making = _mean(self._making, making)
        return self._pool.submit(self._timed, finish, *given)

    def _timed(self, finish: Callable[..., Any], *given: Any) -> Any:
        began = time.perf_counter()
        try:
            return finish(*given)
        finally:
            self._finishing = _mean(self._finishing, time.perf_counter() - began)


def threads_needed(finishing: float, making: float) -> int:
    """Threads that finish a batch in ``finishing`` seconds each, and keep up with one in ``making``."""
    if not finishing or not making:
        return _FIRST
    return min(max(math.ceil(_SLACK * finishing / making), 1), _MOST)


def _mean(before: float, now: float) -> float:
    return (1 - _FRESH) * before + _FRESH * now if before else now
