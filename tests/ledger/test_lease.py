"""One driver at a time: refused while the other lives, taken over when it is dead, noticed when lost."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdbatch.errors import OutputError
from sdbatch.ledger import hold_lease
from sdbatch.storage import LocalStore

_HOLD = """
import sys, time
from sdbatch.ledger import hold_lease
from sdbatch.storage import open_store
with hold_lease(open_store(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(600)
"""


def hold(store: LocalStore, **options: Any) -> Any:
    told: list[str] = []
    return hold_lease(store, told.append, **{"beat": 0.05, "dead": 0.5, **options})


def elsewhere(store: LocalStore, number: int = 1) -> None:
    """A lease of a driver on another machine."""
    holder = {"token": "t", "host": "node-7", "boot": "another", "pid": 1, "since": "1"}
    store.put(f"_sdbatch/lease/{number:07d}.json", json.dumps(holder).encode())


def wait_until_lost(check: Callable[[], None]) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        check()
        time.sleep(0.02)


def test_a_second_driver_is_refused_by_name_until_the_first_has_ended(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with hold(store), pytest.raises(OutputError, match="is in use by the driver"), hold(store):
        pass
    with hold(store):
        pass


def test_a_driver_that_could_not_say_that_it_ended_keeps_its_own_process_from_nothing(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with hold(store):
        pass
    store.put("_sdbatch/lease/0000001.beat.json", b'{"beat": 3}')  # as on a full disk
    with hold(store, dead=3600):
        pass


def test_a_killed_driver_of_this_machine_is_taken_over_at_once(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", _HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    store = LocalStore(tmp_path)
    with pytest.raises(OutputError, match=f"driver {process.pid}"), hold(store):
        pass
    process.kill()
    process.communicate()
    with hold(store, dead=3600):  # no waiting for a heartbeat of a process that is not there
        pass


def test_a_driver_elsewhere_is_alive_while_its_heart_beats(tmp_path: Path) -> None:
    store, stop = LocalStore(tmp_path), threading.Event()
    elsewhere(store)

    def beat() -> None:
        for count in range(10_000):
            store.put("_sdbatch/lease/0000001.beat.json", json.dumps({"beat": count}).encode())
            if stop.wait(0.05):
                return

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        with pytest.raises(OutputError, match="on node-7"), hold(store, dead=30):
            pass
    finally:
        stop.set()
        heart.join()
    told: list[str] = []
    with hold_lease(store, told.append, beat=0.05, dead=0.3):  # it beats no more
        pass
    assert "node-7" in told[0]


def test_a_driver_that_was_taken_over_notices(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with hold(store) as check:
        check()
        elsewhere(store, 2)
        with pytest.raises(OutputError, match="node-7"):
            wait_until_lost(check)
    assert b"ended" not in store.get("_sdbatch/lease/0000001.beat.json")


def test_of_many_drivers_at_once_one_gets_it(tmp_path: Path) -> None:
    store, together, got = LocalStore(tmp_path), threading.Barrier(8), []

    def compete() -> None:
        together.wait()
        try:
            with hold(store):
                got.append(True)
                ended.wait()
        except OutputError:
            got.append(False)
        if len(got) == 8:
            ended.set()

    ended = threading.Event()
    threads = [threading.Thread(target=compete) for _ in range(8)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 30
    while len(got) < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    ended.set()
    for thread in threads:
        thread.join()
    assert sorted(got) == [False] * 7 + [True]


def test_old_leases_do_not_pile_up(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for _ in range(12):
        with hold(store):
            pass
    assert len(list(store.list("_sdbatch/lease/"))) <= 8
