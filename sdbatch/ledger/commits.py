"""Commit records: the small objects whose presence means that a shard is done.

    _sdbatch/commits/0000012.json

Data first, metadata second, record last, each written once. Two writers on one shard leave one record.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from sdbatch.errors import ObjectNotFound, StorageError
from sdbatch.storage import Store

_PREFIX = "_sdbatch/commits/"


@dataclass(frozen=True)
class CommitRecord:
    """A shard's end: what it holds, its checksums, and how long things took."""

    shard: int
    fingerprint: str
    writer: str  # a word of the writer's own, so that it knows its record again
    committed: int
    quarantined: int
    bytes: int
    metadata_key: str
    metadata_sha256: str
    failures: list[dict[str, str]]  # image_id and error of each quarantined request
    seconds: dict[str, float]
    environment: dict[str, str]  # what may change a picture's bytes: device, library versions
    finished_at: float  # seconds since 1970


def commit_key(shard: int) -> str:
    return f"{_PREFIX}{shard:07d}.json"


def put_commit(store: Store, record: CommitRecord) -> bool:
    """Commit the shard; False if another writer did so first."""
    data = json.dumps(asdict(record), sort_keys=True, ensure_ascii=False).encode()
    return store.put_if_absent(commit_key(record.shard), data)


def find_commit(store: Store, shard: int) -> CommitRecord | None:
    try:
        return _parse(store.get(commit_key(shard)), commit_key(shard))
    except ObjectNotFound:
        return None


def committed_shards(store: Store) -> set[int]:
    """The numbers of all shards that are done, by a listing alone."""
    numbers = (re.search(r"(\d+)\.json$", entry.key) for entry in store.list(_PREFIX))
    return {int(number[1]) for number in numbers if number}


def read_commits(store: Store) -> Iterator[CommitRecord]:
    """All commit records in the order of their shards."""
    keys = [entry.key for entry in store.list(_PREFIX)]
    with ThreadPoolExecutor(16) as pool:
        for key, data in zip(keys, pool.map(store.get, keys), strict=True):
            yield _parse(data, key)


def _parse(data: bytes, key: str) -> CommitRecord:
    try:
        content: dict[str, Any] = json.loads(data)
        return CommitRecord(**content)
    except (ValueError, TypeError) as error:
        raise StorageError(f"commit record {key} is damaged: {error}") from None
