"""Several objects at once: how much a store gives or takes is a matter of how many are on their way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

#: Threads come with the first transfers that need them, and stay.
_POOL = ThreadPoolExecutor(64, "transfer")


def at_once(transfer: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """The results of ``transfer`` in the order of the items. No transfer may wait for others."""
    return _POOL.map(transfer, items)
