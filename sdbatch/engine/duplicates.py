"""Near duplicates over a whole job, whatever their shards: read from the metadata, nothing is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sdbatch.checks import first_alike
from sdbatch.errors import StorageError, UsageError
from sdbatch.ledger import Commits, read_job
from sdbatch.spec import parse_spec
from sdbatch.storage import Store
from sdbatch.storage.parquet import read_parquet

_READERS = 16
_COLUMNS = ["image_id", "status", "phash"]


@dataclass(frozen=True)
class Duplicate:
    """A picture that looks like one before it in the plan, and in how many bits their hashes differ."""

    image_id: str
    duplicate_of: str
    distance: int


def find_duplicates(store: Store, most: int | None, progress: Callable[[int, int], None]) -> list[Duplicate]:
    """Every stored picture whose hash differs in at most ``most`` bits from that of a picture before it; the first one.

    None: as many bits as the job's checks allow. Raises UsageError for a job that has no hashes.
    """
    job = read_job(store)
    checks = parse_spec(job.spec, "the output's job.yaml").checks
    if checks is None or checks.near_duplicates is None:
        raise UsageError("OUTPUT: the job has no checks.near_duplicates, whose hashes are compared")
    most = checks.near_duplicates.max_distance if most is None else most
    keys = [record.metadata_key for record in Commits(store).newest() if record.committed]
    with ThreadPoolExecutor(_READERS) as pool:
        tables = list(_followed(pool.map(lambda key: _hashes(store, key), keys), job.shards, progress))
    if not tables:
        return []
    table = pa.concat_tables(tables)
    ids = table.column("image_id").to_pylist()
    hashes = np.array([int(text, 16) for text in table.column("phash").to_pylist()], np.uint64)
    alike = first_alike(hashes, most)
    places = np.flatnonzero(alike < np.arange(len(hashes))).tolist()
    return [Duplicate(ids[at], ids[alike[at]], int(hashes[at] ^ hashes[alike[at]]).bit_count()) for at in places]


def _hashes(store: Store, key: str) -> pa.Table:
    try:
        table = read_parquet(store.get(key), _COLUMNS)
    except (pa.ArrowException, OSError) as error:
        raise StorageError(
            f"{store.uri}/{key} is damaged: {' '.join(str(error).split())}; see 'sdbatch verify'"
        ) from None
    return table.filter(pc.and_(pc.equal(table["status"], "committed"), pc.is_valid(table["phash"])))


def _followed(tables: Iterator[pa.Table], total: int, progress: Callable[[int, int], None]) -> Iterator[pa.Table]:
    for done, table in enumerate(tables, 1):
        progress(done, total)
        yield table
