"""A folder on a file system.

The root may be a symlink, and below it symlinks may lead to other places below it; none leads an object out of it.
What was put is on the disk, under its name, when the call returns: file and folder are both synced.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from sdbatch.errors import ObjectNotFound, StorageError
from sdbatch.storage.store import Entry, Store, cause, check_key, same_bytes

#: Objects are written here and then linked or renamed into place.
STAGING = "_sdbatch/tmp"
#: Staged files older than this, in seconds, belong to writers that were killed.
_ABANDONED = 86400.0
_PIECE = 1 << 20


class LocalStore(Store):
    """Objects are files; a conditional put is an exclusive hard link.

    No symlink leads out of the root, unless ``linked``: what a user names to be read may lie anywhere.
    """

    def __init__(self, root: str | Path, *, linked: bool = False) -> None:
        try:
            self.root = Path(root).expanduser().absolute()
        except RuntimeError as error:  # ~nobody
            raise StorageError(f"{root}: {error}") from None
        self.uri = str(self.root)
        self._linked = linked
        self._swept = False

    def get(self, key: str) -> bytes:
        with self._reading(key) as path:
            return path.read_bytes()

    def fetch(self, key: str, path: Path) -> None:
        with self._reading(key) as source, source.open("rb") as file:
            try:
                with path.open("wb") as copy:
                    shutil.copyfileobj(file, copy, _PIECE)
            except OSError as error:
                path.unlink(missing_ok=True)
                raise StorageError(f"{self.uri}/{key} can't be copied to {path}: {cause(error)}") from None
            except BaseException:
                path.unlink(missing_ok=True)
                raise

    def put(self, key: str, data: bytes) -> None:
        with self._writing(key) as path, self._staged(path, data) as staged:
            os.replace(staged, path)
            _sync(path.parent)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        with self._writing(key) as path, self._staged(path, data) as staged:
            while True:
                try:
                    os.link(staged, path)
                except FileExistsError:
                    try:
                        return self._holds(key, data)
                    except ObjectNotFound:
                        if path.is_dir() or path.is_symlink():
                            raise
                        continue  # it was there, and was gone when it was looked at
                except OSError as error:
                    if error.errno not in {errno.EPERM, errno.EOPNOTSUPP}:
                        raise
                    raise StorageError(
                        f"{path} can't be written: this file system has no hard links, which keep two writers apart; "
                        "use another one, or S3"
                    ) from None
                _sync(path.parent)
                return True

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Read folder by folder as it is asked for, so that what is held are the names of a few folders."""
        folder = prefix.rpartition("/")[0]
        try:
            top = self._path(folder) if folder else self.root
            yield from self._below(top, f"{folder}/" if folder else "", prefix)
        except OSError as error:
            raise StorageError(f"{self.uri}/{prefix} can't be listed: {cause(error)}") from None

    def delete(self, key: str) -> None:
        with self._writing(key) as path, contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def clock(self, key: str) -> float:
        with self._reading(key) as path:
            return path.stat().st_mtime

    def version(self, key: str) -> str:
        with self._reading(key) as path, path.open("rb") as file:
            return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()

    def _path(self, key: str) -> Path:
        """Where the object lies. Raises StorageError if a symlink leads it out of the root."""
        path = self.root / check_key(key)
        if not self._linked and self._has_link(key):
            real = Path(os.path.realpath(path))
            if not real.is_relative_to(os.path.realpath(self.root)):
                raise StorageError(
                    f"{path} leads out of {self.uri} through a symlink, to {real}; "
                    "put the file itself there, or name the place where it lies"
                )
        return path

    def _has_link(self, key: str) -> bool:
        """Is there a symlink on the way from the root to the object?"""
        at = self.uri
        for name in key.split("/"):
            at = f"{at}/{name}"
            if os.path.islink(at):
                return True
        return False

    @contextlib.contextmanager
    def _reading(self, key: str) -> Iterator[Path]:
        path = self._path(key)
        try:
            yield path
        except IsADirectoryError:
            raise ObjectNotFound(f"{path} is a folder, not a file") from None
        except (FileNotFoundError, NotADirectoryError):
            told = f"is a symlink to {os.readlink(path)}, which" if path.is_symlink() else ""
            raise ObjectNotFound(f"{' '.join([str(path), told]).strip()} does not exist") from None
        except OSError as error:
            raise StorageError(f"{path} can't be read: {cause(error)}") from None

    @contextlib.contextmanager
    def _writing(self, key: str) -> Iterator[Path]:
        path = self._path(key)
        try:
            yield path
        except FileExistsError as error:  # of a folder that is to be made
            raise StorageError(f"{path} can't be written: {error.filename} is no folder") from None
        except OSError as error:
            raise StorageError(f"{path} can't be written: {cause(error)}") from None

    @contextlib.contextmanager
    def _staged(self, path: Path, data: bytes) -> Iterator[Path]:
        """The bytes in a file of their own, on the disk, gone again at the end if it still lies there."""
        staging = self._path(STAGING)
        _make(staging)
        _make(path.parent)
        self._sweep(staging)
        staged = staging / uuid.uuid4().hex
        try:
            with staged.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield staged
        finally:
            staged.unlink(missing_ok=True)

    def _sweep(self, staging: Path) -> None:
        """Remove, once before the first put, what writers that were killed have left."""
        if self._swept:
            return
        self._swept = True
        for entry in os.scandir(staging):
            with contextlib.suppress(FileNotFoundError):  # somebody else sweeps as well
                if entry.is_file(follow_symlinks=False) and time.time() - entry.stat().st_mtime > _ABANDONED:
                    os.unlink(entry.path)

    def _holds(self, key: str, data: bytes) -> bool:
        with self._reading(key) as path, path.open("rb") as file:
            return same_bytes(iter(lambda: file.read(_PIECE), b""), data)

    def _below(self, folder: Path, base: str, prefix: str) -> Iterator[Entry]:
        """The files whose keys start with ``prefix``, in the order of their keys."""
        try:
            with os.scandir(folder) as found:
                # In the order of their keys a folder comes where its name and a slash do.
                entries = sorted(
                    found, key=lambda entry: f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name
                )
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            key = f"{base}{entry.name}"
            if not key.startswith(prefix) or key == STAGING:
                continue
            if entry.is_symlink():
                self._path(key)
            try:
                if entry.is_dir(follow_symlinks=False):
                    yield from self._below(folder / entry.name, f"{key}/", prefix)
                elif entry.is_file():
                    yield Entry(key, entry.stat().st_size)
            except FileNotFoundError:  # removed since the folder was read
                continue


def _make(folder: Path) -> None:
    """Make the folder and those above it, each synced into the one that holds it."""
    if not folder.is_dir():
        _make(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)


def _sync(folder: Path) -> None:
    """Bring the names in a folder to the disk; some file systems do so by themselves and refuse to be asked."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.EOPNOTSUPP}:
            raise
    finally:
        os.close(opened)
