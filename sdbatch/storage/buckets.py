"""Google Cloud Storage and Azure Blob Storage, to be read: ``gs://bucket/prefix``, ``az://container/prefix``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.fs as fs

from sdbatch.errors import ObjectNotFound, StorageError, StoreAway
from sdbatch.storage.filesystems import filesystem, is_away, unsigned
from sdbatch.storage.store import Entry, Source, check_key

_CREDENTIALS = {
    "gs://": "GOOGLE_APPLICATION_CREDENTIALS or the machine's account",
    "az://": "AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_KEY or _SAS_TOKEN, or the machine's identity",
}
BUCKETS = tuple(_CREDENTIALS)


class BucketFiles(Source):
    """Objects of a bucket or container below a prefix."""

    def __init__(self, uri: str) -> None:
        scheme, _, path = uri.partition("://")
        self._root = path.strip("/")
        if not self._root:
            raise StorageError(f"'{uri}' names no bucket; write {scheme}://bucket/prefix")
        self.uri = f"{scheme}://{self._root}"
        self._files, _ = filesystem(self.uri)

    def get(self, key: str) -> bytes:
        with self._reading(key) as path, self._files.open_input_stream(path) as stream:
            data: bytes = stream.read()
            return data

    def list(self, prefix: str = "") -> Iterator[Entry]:
        folder = prefix.rpartition("/")[0]
        with self._reading(folder):
            selector = fs.FileSelector(f"{self._root}/{folder}".rstrip("/"), allow_not_found=True, recursive=True)
            infos = [info for info in self._files.get_file_info(selector) if info.type == fs.FileType.File]
        entries = [Entry(info.path.removeprefix(f"{self._root}/"), info.size) for info in infos]
        yield from sorted((entry for entry in entries if entry.key.startswith(prefix)), key=lambda entry: entry.key)

    def version(self, key: str) -> str:
        """The store's own checksum of the bytes where it has one, or the tag of this writing of them."""
        with self._reading(key) as path, self._files.open_input_stream(path) as stream:
            told = {str(pa.scalar(name).as_py()): value for name, value in (stream.metadata() or {}).items()}
        for name in ("md5Hash", "crc32c", "ETag"):
            if told.get(name):
                return f"{name.lower()}:" + told[name].decode().strip('"')
        raise StorageError(f"{self.uri}/{key}: the store tells no checksum and no tag, so changes can't be noticed")

    def exists(self, key: str) -> bool:
        return self.find(key) is not None

    def find(self, key: str) -> Entry | None:
        with self._reading(key) as path:
            info = self._files.get_file_info(path)
        return Entry(key, info.size) if info.type == fs.FileType.File else None

    @contextmanager
    def _reading(self, key: str) -> Iterator[str]:
        path = f"{self._root}/{check_key(key)}" if key else self._root
        try:
            yield path
        except FileNotFoundError:
            raise ObjectNotFound(f"{self.uri}/{key} does not exist") from None
        except (OSError, pa.ArrowException) as error:
            told = unsigned(" ".join(str(error).split()))
            whose = _CREDENTIALS[self.uri[:5]]
            kind = StoreAway if is_away(told) else StorageError
            raise kind(f"{self.uri}/{key} can't be read: {told[:300]}; credentials come from {whose}") from None
