"""Object stores behind one small interface, a local folder or S3, and what else is only read: GCS, Azure, the Hub.

The clients of S3 and of the Hub are imported where they are used: every process of a job imports this, few need them.
"""

from __future__ import annotations

import threading
from functools import lru_cache

from sdbatch.errors import StorageError
from sdbatch.storage.buckets import BUCKETS, BucketFiles
from sdbatch.storage.filesystems import HUB, HUB_NAME, filesystem, is_away, open_file, unsigned
from sdbatch.storage.local import LocalStore
from sdbatch.storage.store import Entry, Source, Store
from sdbatch.storage.transfers import at_once

__all__ = [
    "Entry",
    "LocalStore",
    "Source",
    "Store",
    "at_once",
    "filesystem",
    "is_away",
    "open_file",
    "open_source",
    "open_store",
    "read_object",
    "root_length",
    "unsigned",
]

_READ_ONLY = (HUB, *BUCKETS)


def open_store(uri: str, *, linked: bool = False) -> Store:
    """The store at a folder path, ``file://`` or ``s3://bucket/prefix``; ``linked``: see LocalStore."""
    if uri.startswith("s3://"):
        from sdbatch.storage.s3 import S3Store

        return S3Store(uri)
    if uri.startswith("file://"):
        return LocalStore(uri.removeprefix("file://"), linked=linked)
    if uri.startswith(_READ_ONLY):
        raise StorageError(f"'{uri}': is only read from; use a folder or s3://bucket/prefix")
    if "://" in uri:
        raise StorageError(f"'{uri}': no store of that kind; use a folder or s3://bucket/prefix")
    return LocalStore(uri, linked=linked)


def open_source(uri: str) -> Source:
    """Whatever can be read: a store, ``gs://``, ``az://`` or ``hf://``. Symlinks of a folder may lead out of it.

    A source on the Hub stands for the commit that its revision is now: its ``uri`` says which.
    """
    if uri.startswith(HUB):
        from sdbatch.storage.hub import HubFiles

        return HubFiles(uri)
    if uri.startswith(BUCKETS):
        return BucketFiles(uri)
    if "://" in uri and not uri.startswith(("s3://", "file://")):
        told = ", ".join(f"{scheme}…" for scheme in ("s3://", *BUCKETS, HUB))
        raise StorageError(f"'{uri}': nothing of that kind is read; use a path, {told}")
    return open_store(uri, linked=True)


def root_length(uri: str) -> int:
    """How many of the URI's characters name what is never a single object: a bucket, a data set's repository."""
    if "://" not in uri:
        return 0
    if found := HUB_NAME.match(uri):
        return len(found["root"])
    scheme, _, rest = uri.partition("://")
    return len(f"{scheme}://{rest.partition('/')[0]}")


def read_object(uri: str) -> bytes:
    """One object, by its address."""
    length = root_length(uri)
    with _opening:
        source = _source(uri[:length])
    return source.get(uri[length + 1 :])


_opening = threading.Lock()  # so that those who read at once share one client
_source = lru_cache(maxsize=64)(open_source)
