"""The lease: at most one driver works on an output, as far as that can be known.

    _sdbatch/lease/0000001.json        who took it; written once, so of two drivers one has it
    _sdbatch/lease/0000001.beat.json   its heartbeat, written anew every few seconds, by the holder alone: that it is
                                       alive, and what it would like to be known of its work

A driver is alive while its heartbeat changes, seen by the clock of who looks. One that ended says so in its last beat,
and one whose process is gone from the same machine need not be waited for. Who takes over writes the next number. The
lease saves work and confusion; what keeps commits right when two drivers do work at once is that they are written once.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdbatch.errors import ObjectNotFound, OutputError, StorageError
from sdbatch.storage import Store

_PREFIX = "_sdbatch/lease/"
_KEPT = 2  # leases that stay when a new one is taken; older ones are history

#: Seconds between two heartbeats, and without one after which a driver counts as dead.
BEAT = 5.0
DEAD = 20.0

#: Tokens of the leases that this process holds: one that could not say that it ended, on a full disk, did end.
_held: set[str] = set()


@contextmanager
def hold_lease(
    store: Store,
    on_wait: Callable[[str], None],
    tell: Callable[[], Mapping[str, Any]] = dict,
    *,
    beat: float = BEAT,
    dead: float = DEAD,
) -> Iterator[Callable[[], None]]:
    """Hold the output's lease. Yields a check that raises OutputError once another driver has taken over.

    Raises OutputError while another driver holds it and is alive; ``on_wait`` hears of whom it takes a while to tell.
    What ``tell`` says goes with every heartbeat, for whoever watches.
    """
    number = _newest(store)
    if number and not _is_over(store, number, on_wait, dead):
        raise OutputError(f"{_in_use(store, number)}; wait for it, or stop it")
    number += 1
    token = uuid.uuid4().hex
    mine = {"token": token, "host": platform.node(), "boot": _boot(), "pid": os.getpid(), "since": _since()}
    _held.add(token)
    try:
        if not store.put_if_absent(_key(number), json.dumps(mine).encode()):
            raise OutputError(f"{_in_use(store, number)}; it was a moment faster")
        for old in range(max(number - 2 * _KEPT, 1), number - _KEPT + 1):
            store.delete(_beat_key(old))
            store.delete(_key(old))
        heart = _Heart(store, number, beat, tell)
        heart.start()
        try:
            yield heart.check
        finally:
            heart.stop()
    finally:
        _held.discard(token)


class _Heart(threading.Thread):
    """Beats until it is stopped, and notices a successor."""

    def __init__(self, store: Store, number: int, pause: float, tell: Callable[[], Mapping[str, Any]]) -> None:
        super().__init__(name="lease", daemon=True)
        self._store, self._number, self._pause, self._tell = store, number, pause, tell
        self._stopped = threading.Event()
        self._lost = False
        self._beat({"beat": 0})

    def run(self) -> None:
        count = 0
        while not self._stopped.wait(self._pause):
            count += 1
            try:
                self._beat({"beat": count})
                self._lost = self._store.exists(_key(self._number + 1))
            except StorageError:  # a store that is away for longer ends the job by itself
                continue
            if self._lost:
                return

    def check(self) -> None:
        if self._lost:
            raise OutputError(f"{_in_use(self._store, self._number + 1)}: it found no sign of life of this one")

    def stop(self) -> None:
        self._stopped.set()
        self.join()
        if not self._lost:
            try:
                self._beat({"ended": True})
            except StorageError:  # the next driver will wait for a heartbeat that does not come
                return

    def _beat(self, content: dict[str, Any]) -> None:
        told = {**content, "at": round(time.time(), 3), "now": dict(self._tell())}
        self._store.put(_beat_key(self._number), json.dumps(told).encode())


@dataclass(frozen=True)
class Driver:
    """The driver that holds the lease, or held it last. ``state``: alive, ended, dead, silent (nobody can tell why)."""

    state: str
    host: str
    pid: int
    seconds_silent: float  # since its last heartbeat, by the two machines' clocks
    now: dict[str, Any]  # what it told of its work


def read_driver(store: Store) -> Driver | None:
    """The driver of this output as one look finds it; None where there never was one."""
    number = _newest(store)
    holder, beat = _read(store, _key(number)), _read(store, _beat_key(number))
    if not holder:
        return None
    silent = max(time.time() - float(beat.get("at", 0)), 0.0)
    if beat.get("ended"):
        state = "ended"
    elif holder.get("boot") == _boot() != "":
        state = "alive" if _is_alive_here(holder) else "dead"
    else:
        state = "alive" if silent < DEAD else "silent"
    now = beat["now"] if isinstance(beat.get("now"), dict) else {}
    return Driver(state, str(holder.get("host")), int(holder.get("pid", 0)), round(silent, 1), now)


def _is_over(store: Store, number: int, on_wait: Callable[[str], None], dead: float) -> bool:
    """Did the holder of this lease end or die? Found out at once, or by waiting for its heart to beat."""
    holder, first = _read(store, _key(number)), _read(store, _beat_key(number))
    if first.get("ended") or _is_dead_here(holder):
        return True
    if _is_alive_here(holder):
        return False
    on_wait(f"waiting up to {dead:.0f} s to see whether the driver on {holder.get('host', 'another machine')} is alive")
    deadline = time.monotonic() + dead
    while time.monotonic() < deadline:
        time.sleep(min(1.0, dead / 10))
        now = _read(store, _beat_key(number))
        if now != first:
            return bool(now.get("ended"))
    return True


def _is_dead_here(holder: dict[str, Any]) -> bool:
    """Was it a process of this very machine, which runs no more?"""
    return holder.get("boot") == _boot() != "" and not _is_alive_here(holder)


def _is_alive_here(holder: dict[str, Any]) -> bool:
    if holder.get("pid") == os.getpid() and holder.get("token") not in _held:
        return False
    return holder.get("boot") == _boot() != "" and _since(holder.get("pid")) == holder.get("since") is not None


def _boot() -> str:
    """A word for this machine since it was started, with its process ids' name space; empty where it has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _since(pid: int | None = None) -> str | None:
    """When a process of this machine began, in its own ticks; None where there is none, or only its exit status."""
    try:
        fields = Path(f"/proc/{pid or os.getpid()}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in {"Z", "X"} else fields[19]


def _newest(store: Store) -> int:
    numbers = [int(entry.key.removeprefix(_PREFIX).partition(".")[0]) for entry in store.list(_PREFIX)]
    return max(numbers, default=0)


def _in_use(store: Store, number: int) -> str:
    holder = _read(store, _key(number))
    return f"output.uri: {store.uri} is in use by the driver {holder.get('pid')} on {holder.get('host')}"


def _read(store: Store, key: str) -> dict[str, Any]:
    try:
        content = json.loads(store.get(key))
        return content if isinstance(content, dict) else {}
    except (ObjectNotFound, ValueError):
        return {}


def _key(number: int) -> str:
    return f"{_PREFIX}{number:07d}.json"


def _beat_key(number: int) -> str:
    return f"{_PREFIX}{number:07d}.beat.json"
