"""Collecting commit records, a slice at a time, beside the driver's work."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Self

import numpy as np

from sdbatch.errors import StorageError
from sdbatch.ledger import Commits, Shards, collect, put_totals
from sdbatch.storage import Store


class Collector:
    """Knows which ``shards`` of one edition are still to be done, and collects a slice's records when all are."""

    def __init__(self, store: Store, shards: Shards, commits: Commits, edition: int) -> None:
        self._store, self._edition = store, edition
        self._numbers, self._slices = shards.column("number"), shards.column("slice")
        todo = ~commits.done(self._numbers, self._slices, edition)
        self.todo = shards.where(todo)
        self._left = np.bincount(self._slices[todo], minlength=int(self._slices.max(initial=0)) + 1)
        self._thread = ThreadPoolExecutor(1, "collector")
        for number in np.unique(self._slices):
            if not self._left[number] and (number, edition) not in commits.collected:
                self._thread.submit(self._collect, int(number))

    def committed(self, number: int) -> None:
        """A shard is done."""
        of = int(self._slices[np.searchsorted(self._numbers, number)])
        self._left[of] -= 1
        if not self._left[of]:
            self._thread.submit(self._collect, of)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for what is to be collected; after an error only for what is being collected."""
        self._thread.shutdown(cancel_futures=kind is not None)

    def _collect(self, number: int) -> None:
        first, end = np.searchsorted(self._slices, [number, number + 1])
        with suppress(StorageError):  # nothing is lost: the next driver collects it
            collect(self._store, number, self._edition, self._numbers[first:end].tolist())
            put_totals(self._store)
