"""Object stores behind one small interface: a local folder or S3."""

from __future__ import annotations

from functools import lru_cache

from sdbatch.errors import StorageError
from sdbatch.storage.local import LocalStore
from sdbatch.storage.s3 import S3Store
from sdbatch.storage.store import Entry, Store

__all__ = ["Entry", "LocalStore", "S3Store", "Store", "open_store", "read_object"]


def open_store(uri: str, *, linked: bool = False) -> Store:
    """The store at a folder path, ``file://`` or ``s3://bucket/prefix``; ``linked``: see LocalStore."""
    if uri.startswith("s3://"):
        return S3Store(uri)
    if uri.startswith("file://"):
        return LocalStore(uri.removeprefix("file://"), linked=linked)
    if "://" in uri:
        raise StorageError(f"'{uri}': no store of that kind; use a folder or s3://bucket/prefix")
    return LocalStore(uri, linked=linked)


def read_object(uri: str) -> bytes:
    """One file or object, by its path, ``file://`` or ``s3://`` address."""
    root, _, key = uri.rpartition("/")
    return _reader(root or ".").get(key)


@lru_cache(maxsize=64)
def _reader(root: str) -> Store:
    return open_store(root)
