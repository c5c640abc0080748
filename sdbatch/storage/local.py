"""A folder on a file system."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from sdbatch.errors import ObjectNotFound, StorageError
from sdbatch.storage.store import Entry, Store, check_key

#: Objects are written here and then linked or renamed into place.
STAGING = "_sdbatch/tmp"


class LocalStore(Store):
    """Objects are files; a conditional put is an exclusive hard link."""

    def __init__(self, root: str | Path) -> None:
        try:
            self.root = Path(root).expanduser().absolute()
        except RuntimeError as error:  # ~nobody
            raise StorageError(f"{root}: {error}") from None
        self.uri = str(self.root)

    def get(self, key: str) -> bytes:
        try:
            return self._path(key).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise ObjectNotFound(f"{self.uri}/{key} does not exist") from None
        except OSError as error:
            raise StorageError(f"{self.uri}/{key} can't be read: {error.strerror}") from None

    def fetch(self, key: str, path: Path) -> None:
        try:
            shutil.copyfile(self._path(key), path)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise ObjectNotFound(f"{self.uri}/{key} does not exist") from None
        except OSError as error:
            raise StorageError(f"{self.uri}/{key} can't be copied to {path}: {error.strerror}") from None

    def put(self, key: str, data: bytes) -> None:
        path = self._path(key)
        try:
            os.replace(self._stage(path, data), path)
        except OSError as error:
            raise self._unwritable(key, error) from None

    def put_if_absent(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        try:
            staged = self._stage(path, data)
            try:
                os.link(staged, path)
            finally:
                staged.unlink()
        except FileExistsError:
            return self.get(key) == data
        except OSError as error:
            raise self._unwritable(key, error) from None
        return True

    def list(self, prefix: str = "") -> Iterator[Entry]:
        top = self.root / prefix.rpartition("/")[0]
        found = []
        for folder, names, files in os.walk(top):
            base = Path(folder).relative_to(self.root).as_posix()
            base = "" if base == "." else f"{base}/"
            names[:] = [
                name
                for name in names
                if f"{base}{name}" != STAGING and f"{base}{name}/".startswith(prefix[: len(base) + len(name) + 1])
            ]
            found += [f"{base}{name}" for name in files if f"{base}{name}".startswith(prefix)]
        for key in sorted(found):
            try:
                yield Entry(key, (self.root / key).stat().st_size)
            except FileNotFoundError:  # removed since the folder was read
                continue

    def delete(self, key: str) -> None:
        try:
            self._path(key).unlink(missing_ok=True)
        except OSError as error:
            raise self._unwritable(key, error) from None

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def version(self, key: str) -> str:
        try:
            with self._path(key).open("rb") as file:
                return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise StorageError(f"{self.uri}/{key} can't be read: {error.strerror}") from None

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _stage(self, path: Path, data: bytes) -> Path:
        """Write the bytes to disk beside the root's other objects, under a name of their own."""
        staging = self.root / STAGING
        staging.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = staging / uuid.uuid4().hex
        with staged.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return staged

    def _unwritable(self, key: str, error: OSError) -> StorageError:
        return StorageError(f"{self.uri}/{key} can't be written: {error.strerror}")
