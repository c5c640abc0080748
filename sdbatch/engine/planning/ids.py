"""Ids that are there twice, found by tasks: no process ever holds all ids of the table."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import pyarrow as pa
import ray

from sdbatch.engine.planning.tasks import TASK, in_order
from sdbatch.errors import InputError
from sdbatch.prompts import doubled_ids, usable_ids

#: A column in which more ids than this are there already is none of ids.
MOST_DOUBLES = 1_000_000
#: Ids are taken from the table this many at a time, gathered in groups of so many (fewer where ids are long), and
#: compared in so many buckets: of 100 million ids each bucket has 800,000, and a group's share of it, 8,000, is not so
#: small that Ray keeps it in the driver.
ID_ROWS = 65_536
GROUP = 16
_GROUP_BYTES = 64 << 20
_BUCKETS = 128


class Doubles:
    """Rows whose id an earlier row has, and the first such row of each."""

    def __init__(self, found: Mapping[int, int]) -> None:
        self._rows = np.array(sorted(found), np.int64)
        self._firsts = np.array([found[row] for row in sorted(found)], np.int64)

    def within(self, first_row: int, rows: int) -> dict[int, int]:
        """Those of consecutive rows."""
        start, end = np.searchsorted(self._rows, [first_row, first_row + rows])
        return dict(zip(self._rows[start:end].tolist(), self._firsts[start:end].tolist(), strict=True))


def find_doubles(tables: Iterable[pa.Table]) -> Doubles:
    """Compare the ids of the whole table, which come in consecutive parts, without ever holding them all.

    Groups of parts are compared within themselves first, then the first ones of each, bucket by bucket, across groups.
    Raises InputError for more than MOST_DOUBLES.
    """
    within, across = ray.remote(**TASK)(_doubles_within), ray.remote(**TASK)(_doubles_across)
    pieces: list[list[ray.ObjectRef[pa.Table]]] = []
    doubles: dict[int, int] = {}

    def add(found: pa.Table) -> None:
        doubles.update(zip(found.column("row").to_pylist(), found.column("first").to_pylist(), strict=True))
        if len(doubles) > MOST_DOUBLES:
            raise InputError(
                f"input.columns.id: more than {MOST_DOUBLES:,} rows have an id that an earlier row has; "
                "the column holds no ids: map another one, or none"
            )

    def start() -> Iterator[ray.ObjectRef[pa.Table]]:
        row = 0
        for group in _groups(tables):
            buckets = within.options(num_returns=1 + _BUCKETS).remote(row, *group)
            pieces.append(buckets[1:])
            row += sum(len(ids) for ids in group)
            yield buckets[0]

    for found in in_order(start()):
        add(found)
    if len(pieces) > 1:
        for found in in_order(across.remote(*bucket) for bucket in zip(*pieces, strict=True)):
            add(found)
    return Doubles({row: doubles.get(first, first) for row, first in doubles.items()})


def _groups(tables: Iterable[pa.Table]) -> Iterator[list[pa.Table]]:
    group = list[pa.Table]()
    for ids in tables:
        group.append(ids)
        if len(group) == GROUP or sum(part.nbytes for part in group) >= _GROUP_BYTES:
            yield group
            group = []
    if group:
        yield group


# Parts are tables because Ray sends those, and nothing else of Arrow's, without what else lies in their buffers.
def _doubles_within(first_row: int, *parts: pa.Table) -> tuple[pa.Table, ...]:
    """The doubles of consecutive ids; then the first of each id, in buckets."""
    firsts, doubles = doubled_ids(usable_ids(pa.concat_tables(parts).column("id"), first_row))
    bucket = np.array([zlib.crc32(name.encode()) % _BUCKETS for name in firsts.column("id").to_pylist()])
    return doubles, *(firsts.filter(pa.array(bucket == number)) for number in range(_BUCKETS))


def _doubles_across(*pieces: pa.Table) -> pa.Table:
    return doubled_ids(pa.concat_tables(pieces))[1]
