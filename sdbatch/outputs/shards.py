"""What every form of a shard has in common: how its pictures are stored.

Every object is written once and never changed: where another writer's object stands already, that one is the
shard's, and what it holds is what gets recorded. So a commit can never disagree with the bytes.

Finished batches of a shard outlive the process that made them: files are where they belong at once, the other
forms keep a tar a batch under ``_sdbatch/batches/`` until the shard is committed.

A picture's ``path`` is the key of the object that holds it, with ``#`` and the place inside where several
share one: a member's name in a tar, a row's number in a Parquet file.
"""

from __future__ import annotations

import hashlib
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa

from sdbatch.errors import StorageError
from sdbatch.outputs.metadata import NO_CHECKS, CheckColumns, metadata_key
from sdbatch.storage import Store

Row = Mapping[str, Any]

#: What readers of tars and Parquet files raise where one is damaged.
DAMAGES = (tarfile.TarError, pa.ArrowException, OSError, ValueError, KeyError, TypeError, EOFError)
_Held = TypeVar("_Held")


@dataclass(frozen=True)
class EncodedPicture:
    """A picture ready to be stored: its place in the shard, its metadata so far, its bytes."""

    position: int
    row: Row
    data: bytes


@dataclass(frozen=True)
class StoredPicture:
    """A picture as it is stored now."""

    position: int
    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class StoredShard:
    """A shard's pictures as they are stored, and the sha256 of each other object that belongs to it, by its key."""

    pictures: list[StoredPicture]
    objects: dict[str, str]


class ShardWriter(ABC):
    """Stores the pictures of shards under ``root``. ``ending`` is that of one picture: png, jpeg or webp.

    ``checked``: the columns that checks fill in, among those that describe the pictures.
    """

    def __init__(self, store: Store, ending: str, root: str = "data", checked: CheckColumns = NO_CHECKS) -> None:
        self.store = store
        self.ending = ending
        self.root = root
        self.checked = checked

    @abstractmethod
    def kept(self, stem: str) -> dict[int, bytes]:
        """Position → bytes of the pictures of an unfinished shard that outlived their maker."""

    @abstractmethod
    def keep(self, stem: str, batch: Sequence[EncodedPicture], *, last: bool) -> list[EncodedPicture]:
        """Make a batch's pictures outlive this process; ``last`` if the shard is finished right after.

        Returns them as they are stored, which is not as given if another writer was first.
        """

    @abstractmethod
    def carry_over(self, stem: str, pictures: Sequence[EncodedPicture]) -> None:
        """Take pictures of an earlier edition, which are safe there, into this one."""

    @abstractmethod
    def finish(self, stem: str, pictures: Sequence[EncodedPicture]) -> StoredShard:
        """Store the whole shard, all kept or carried over; returns what the store holds for it then."""

    @abstractmethod
    def forget(self, stem: str) -> None:
        """Remove what only an unfinished shard needs."""


def write_once(store: Store, key: str, data: bytes, read: Callable[[bytes], _Held]) -> tuple[_Held | None, str]:
    """Store the object unless one is there. None: it is stored as given; else what the one that is there holds.

    With it the sha256 of the object that is there.
    """
    if store.put_if_absent(key, data):
        return None, hashlib.sha256(data).hexdigest()
    there = store.get(key)
    try:
        return read(there), hashlib.sha256(there).hexdigest()
    except DAMAGES:
        raise StorageError(f"{store.uri}/{key} is in the way and is no shard; remove it") from None


def stored(position: int, path: str, data: bytes) -> StoredPicture:
    """What is recorded of a picture."""
    return StoredPicture(position, path, len(data), hashlib.sha256(data).hexdigest())


def remove_shard(store: Store, stem: str, roots: Iterable[str]) -> None:
    """Remove an edition of a shard, its metadata last: whatever lies below these ``roots`` under its name."""
    for root in roots:
        for entry in list(store.list(f"{root}/{stem}")):
            if entry.key[len(f"{root}/{stem}")] in "./":  # not a longer number's, nor another edition's
                store.delete(entry.key)
    store.delete(metadata_key(stem))
