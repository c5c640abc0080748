"""Threads that encode and store batches beside the model: as many as keep up with it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

#: Threads to begin with, before anything was measured, and at most.
_FIRST, _MOST = 2, 16
#: Batches that may wait for a thread. What waits is lost with the process, and fills its memory.
_WAITING = 2
#: How much of a new measurement goes into the mean.
_FRESH = 0.3
#: Finishing may vary by so much before it falls behind.
_SLACK = 1.25


class Finishers:
    """Finishes batches in threads, whose number follows from what a batch takes here and in the model, as measured."""

    def __init__(self) -> None:
        self.threads = 0
        self._work: SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = SimpleQueue()
        self._finishing = self._making = 0.0
        self._grow(_FIRST)

    @property
    def room(self) -> int:
        """Batches that may be on their way through here."""
        return self.threads + _WAITING

    def submit(self, making: float, finish: Callable[..., Any], *given: Any) -> Future[Any]:
        """Have ``finish(*given)`` done for a batch that the model was at for ``making`` seconds."""
        self._making = _mean(self._making, making)
        self._grow(threads_needed(self._finishing, self._making))
        future: Future[Any] = Future()
        self._work.put((future, finish, given))
        return future

    def _grow(self, wanted: int) -> None:
        for _ in range(self.threads, wanted):
            threading.Thread(target=self._serve, name=f"finisher-{self.threads}", daemon=True).start()
            self.threads += 1

    def _serve(self) -> None:
        while True:
            future, finish, given = self._work.get()
            began = time.perf_counter()
            try:
                future.set_result(finish(*given))
            except BaseException as error:
                future.set_exception(error)
            self._finishing = _mean(self._finishing, time.perf_counter() - began)


def threads_needed(finishing: float, making: float) -> int:
    """Threads that finish a batch in ``finishing`` seconds each, and keep up with one in ``making``."""
    if not making:
        return _FIRST
    return min(max(math.ceil(_SLACK * finishing / making), 1), _MOST)


def _mean(before: float, now: float) -> float:
    return (1 - _FRESH) * before + _FRESH * now if before else now
