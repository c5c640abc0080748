"""One small interface to a folder somewhere: on disk or in an object store."""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sdbatch.errors import StorageError


@dataclass(frozen=True)
class Entry:
    """An object's key below the store's root, and its size in bytes."""

    key: str
    size: int


class Source(ABC):
    """Objects by key ("a/b.png") below one root, to be read.

    Raises ObjectNotFound for a key that is not there and StorageError when the source fails for good.
    """

    uri: str

    @abstractmethod
    def get(self, key: str) -> bytes:
        """The object's bytes."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[Entry]:
        """All objects whose key starts with ``prefix``, in the order of their keys."""

    @abstractmethod
    def version(self, key: str) -> str:
        """A word that changes when the object's bytes do."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Is there an object under this very key?"""

    def find(self, key: str) -> Entry | None:
        """The object under this very key, None where there is none."""
        return next((entry for entry in self.list(key) if entry.key == key), None) if self.exists(key) else None


class Store(Source):
    """A source that is written, too. No reader ever sees half an object."""

    @abstractmethod
    def fetch(self, key: str, path: Path) -> None:
        """Copy the object, however large, to a local file that is not there yet; on failure there is none."""

    @abstractmethod
    def put(self, key: str, data: bytes) -> None:
        """Store the object whole, replacing what was there."""

    @abstractmethod
    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Store the object unless there is one; of several writers exactly one succeeds.

        True if the object that is stored now has these very bytes, whoever put them there; False if
        another one was there first.
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object; nothing happens where there is none."""

    @abstractmethod
    def clock(self, key: str) -> float:
        """The store's own time, in seconds since 1970, told when an object was put just now under that key."""


def check_key(key: str) -> str:
    """Refuse a key that could leave the root."""
    parts = key.split("/")
    if not key or "\0" in key or any(part in {"", ".", ".."} for part in parts):
        raise StorageError(f"'{key}' is not a key")
    return key


def same_bytes(pieces: Iterable[bytes], data: bytes) -> bool:
    """Do the pieces, one after the other, make up ``data``? Reads no further than the first difference."""
    rest = memoryview(data)
    for piece in pieces:
        if rest[: len(piece)] != piece:
            return False
        rest = rest[len(piece) :]
    return not rest


def cause(error: OSError) -> str:
    """Why a file can't be read or written, in words."""
    if error.errno == errno.ENOSPC:
        return "the disk is full; free some space and run the same command again"
    if error.errno == errno.EDQUOT:
        return "the disk quota is used up; free some space and run the same command again"
    return error.strerror or str(error)
