"""Compiled once for a whole pool: one actor compiles, the others wait for what it made.

    $XDG_CACHE_HOME/sdbatch/compiled/KEY/         what was compiled on this node; the next job here finds it
    OUTPUT/_sdbatch/compiled/KEY/SHA256.tar       for actors on other nodes, and for the next run
    $XDG_CACHE_HOME/sdbatch/compiled/known.json   the driver's: which tar of which output is what its actors made

KEY stands for the model, its settings, the batch size, torch and the device. It is code that runs, and an output may
pass through many hands: no tar is loaded but by the checksum that its maker told, through Ray or that driver's record.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdbatch.engine.models.turns import Desk
from sdbatch.errors import ModelError, StorageError
from sdbatch.storage import Store

#: Seconds between two questions whether somebody else is through.
_POLL = 0.5


class CompiledCode:
    """What was compiled for one model, as an actor has it."""

    def __init__(self, store: Store, desk: Desk, key: str) -> None:
        self._store, self._desk, self._key = store, desk, key
        self.folder = _cache() / key
        self._ready = set[str]()

    @contextmanager
    def ready(self, shape: str) -> Iterator[None]:
        """In here pictures of a shape are drawn: with what others compiled for it, or else this process compiles."""
        if shape in self._ready:
            yield
            return
        key = f"{self._key}/{hashlib.sha256(shape.encode()).hexdigest()[:16]}"
        here = self.folder / f"{key.rpartition('/')[2]}.done"
        mine = not here.exists() and self._is_mine(key)
        try:
            yield
        except BaseException:
            if mine:
                self._desk.turn_done(key, "")
            raise
        if mine:
            self._desk.turn_done(key, self._put())
        here.touch()
        self._ready.add(shape)

    def _is_mine(self, key: str) -> bool:
        """Wait until somebody has compiled it and take that over, or until it is this actor's turn."""
        while (found := self._desk.turn(key)) is None:
            time.sleep(_POLL)
        return not found or not self._take(found)

    def _take(self, sha256: str) -> bool:
        """Unpack what was compiled elsewhere. False where it is gone, or not what its maker told."""
        from sdbatch.diffusion.compilation import unpack  # torch takes seconds to import

        try:
            data = self._store.get(self._at(sha256))
            if hashlib.sha256(data).hexdigest() != sha256:
                return False
            unpack(data, self.folder)
        except (StorageError, ModelError):
            return False
        return True

    def _put(self) -> str:
        """Store what is here; its checksum, empty where the store did not take it."""
        from sdbatch.diffusion.compilation import pack  # as above

        data = pack(self.folder)
        sha256 = hashlib.sha256(data).hexdigest()
        try:
            self._store.put_if_absent(self._at(sha256), data)  # what is there by this name already is the same
        except StorageError:
            return ""
        return sha256

    def _at(self, sha256: str) -> str:
        return f"_sdbatch/compiled/{self._key}/{sha256}.tar"


def code_key(*deciding: Any) -> str:
    """A name for everything that decides what the compiler makes."""
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:32]


def known_code(output: str) -> dict[str, str]:
    """Shape's key → checksum, of what actors of this user's drivers compiled for an output."""
    return _record().get(output, {})


def keep_code(output: str, known: Mapping[str, str]) -> None:
    """Remember it. Nothing happens where that can't be written."""
    record = {output: {**known_code(output), **known}}
    record |= {other: keys for other, keys in _record().items() if other != output}
    path = _cache() / "known.json"
    partial = path.with_name(f"known.{os.getpid()}.partial")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial.write_text(json.dumps(dict(list(record.items())[:_MOST_OUTPUTS])), encoding="utf-8")
        partial.replace(path)
    except OSError:
        return


_MOST_OUTPUTS = 1000


def _record() -> dict[str, dict[str, str]]:
    try:
        found = json.loads((_cache() / "known.json").read_text(encoding="utf-8"))
        return {str(output): {str(key): str(sum_) for key, sum_ in keys.items()} for output, keys in found.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdbatch/compiled"
