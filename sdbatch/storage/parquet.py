"""Reading a small Parquet file that is in memory already."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq


def read_parquet(data: bytes, columns: Sequence[str] | None = None, *, checksums: bool = False) -> pa.Table:
    """The table, read by the calling thread alone; ``checksums``: compared page by page.

    Arrow's own threads let go of what they read when it suits them, at the interpreter's end, too, and a thread that
    then wants Python's lock takes the process with it. Raises ArrowException or OSError for what is no such file.
    """
    file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False, page_checksum_verification=checksums)
    missing = [name for name in columns or () if name not in file.schema_arrow.names]
    if missing:
        raise pa.ArrowInvalid(f"there is no column {', '.join(missing)}")
    return file.read(columns=None if columns is None else list(columns), use_threads=False)
