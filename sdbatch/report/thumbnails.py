"""Small pictures of many, in packs: a page of 100,000 pictures is a thousand objects, not a hundred thousand."""

from __future__ import annotations

import base64
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from PIL import Image

from sdbatch.storage import Store

Read = Callable[[Store, Iterable[str]], dict[str, bytes]]
Row = Mapping[str, Any]

#: Pictures a pack: at most, and at least where shards are small.
_MOST, _FEWEST = 128, 64
_FORMATS = ("PNG", "JPEG", "WEBP")
_QUALITY = 85
_VERSION = "thumbnails, 1"


@dataclass(frozen=True)
class Pack:
    """The thumbnails of some rows, side by side in the table. The name is a digest of what is in it."""

    name: str
    rows: list[Row]


def packs(shards: Iterable[Sequence[Row]], side: int) -> Iterator[list[Pack]]:
    """Packs of the rows, and with them those that are best made at once, because they share stored objects."""
    group: list[Row] = []
    for rows in shards:
        group += rows
        if len(group) >= _FEWEST:
            yield from _cut(group, side)
            group = []
    yield from _cut(group, side)


def _cut(group: list[Row], side: int) -> Iterator[list[Pack]]:
    count = -(-len(group) // _MOST)
    size = -(-len(group) // max(count, 1))
    found = []
    for first in range(0, len(group), max(size, 1)):
        rows = group[first : first + size]
        told = [_VERSION, str(side), *(str(row["sha256"]) for row in rows)]
        found.append(Pack(hashlib.sha256("\n".join(told).encode()).hexdigest()[:16], rows))
    if any("#" in (row["path"] or "") for row in group):
        yield found  # a tar or a Parquet file is read once
    else:
        yield from ([pack] for pack in found)


def draw_packs(store: Store, together: Sequence[Pack], read_pictures: Read, side: int) -> dict[str, list[str]]:
    """Name → the thumbnails of its rows, WebP in base64; empty for what has no picture (any more)."""
    paths = [row["path"] for pack in together for row in pack.rows if row["path"]]
    pictures = read_pictures(store, paths)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        small = dict(zip(pictures, pool.map(lambda data: _thumbnail(data, side), pictures.values()), strict=True))
    return {pack.name: [small.get(row["path"], "") for row in pack.rows] for pack in together}


def _thumbnail(data: bytes, side: int) -> str:
    buffer = io.BytesIO()
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
            picture.thumbnail((side, side))
            picture.convert("RGB").save(buffer, "WEBP", quality=_QUALITY)
    except Exception:  # Pillow's readers raise whatever a damaged file makes them
        return ""
    return base64.b64encode(buffer.getvalue()).decode()
