"""A million rows through everything but a model: ``python -m tests.benchmarks.scale [--rows N] [--table CSV]``.

Plans the table, runs it with ``builtin:null``, kills driver, raylet and actors at the half, runs it again, asks for its
status and verifies it; all that with a tenth of the rows first, to tell what grows with them. Prints rows a second and
the largest memory of driver and workers, phase by phase, the time from the start of the second run to the first shard
that it hands out, and what the ledger holds and a status reads of it. ``--table`` names a CSV whose column ``prompt``
is used over and over; without it prompts are made up.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

from sdbatch.ledger import read_status
from sdbatch.storage import Entry, open_store


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.scale")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--shard-size", type=int, default=512)
    parser.add_argument("--folder", type=Path, default=Path(".work/scale"))
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    figures = {
        f"{rows:,} rows": of_rows(rows, options.table, options.actors, options.shard_size, options.folder.absolute())
        for rows in (options.rows // 10, options.rows)
    }
    print(json.dumps(figures, indent=2))


def of_rows(rows: int, source: Path | None, actors: int, shard_size: int, folder: Path) -> dict[str, Any]:
    """All phases of a job of so many rows, in a folder of its own."""
    folder = folder / str(rows)
    folder.mkdir(parents=True)
    write_table(folder / "prompts.csv", rows, source)
    spec = {
        "name": "scale",
        "input": {"uri": str(folder / "prompts.csv"), "columns": {"id": "id"}},
        "model": {"uri": "builtin:null"},
        "output": {"uri": str(folder / "out"), "format": "webdataset", "shard_size": shard_size},
        "resources": {"actors": actors, "batch_size": 64},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(spec))
    out, figures = str(folder / "out"), dict[str, Any]()

    def measure(name: str, images: int, *arguments: str, **options: Any) -> None:
        figures[name] = measured(folder, images, *arguments, **options)
        print(f"{rows:,} rows, {name}: {json.dumps(figures[name])}", file=sys.stderr)

    def status(name: str) -> None:
        measure(name, 0, "status", out, "--json")
        figures[name]["bytes read"], figures[name]["objects listed"] = read_by_a_status(out)

    measure("plan", rows, "plan", "job.yaml", "--json")
    measure("run to the half, then killed", 0, "run", "job.yaml", "--json", killed_at=rows // 2)
    half = read_status(open_store(out)).committed
    killed = figures["run to the half, then killed"]
    killed["committed"], killed["rows/s"] = half, round(half / (killed["seconds"] - killed["to the first shard, s"]))
    status("status at the half")
    measure("resume", rows - half, "run", "job.yaml", "--json")
    status("status at the end")
    measure("verify", rows, "verify", out, "--json")
    figures["ledger"] = ledger(out)
    return figures


def write_table(path: Path, rows: int, source: Path | None) -> None:
    prompts = [f"prompt number {i}" for i in range(1000)]
    if source is not None:
        with source.open(newline="") as file:
            prompts = [row["prompt"] for row in csv.DictReader(file)]
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "prompt"])
        for i, prompt in zip(range(rows), itertools.cycle(prompts), strict=False):
            table.writerow([f"r{i}", prompt])


#: ``sdbatch``, which tells when it hands out its first shard.
_TIMED = """
import sys, time
from pathlib import Path
from sdbatch.cli import main
from sdbatch.engine.making.pool import Pool

def hand(pool, *arguments, hand=Pool._hand):
    if not Path("handed").exists():
        Path("handed").write_text(str(time.time()))
    hand(pool, *arguments)

Pool._hand = hand
main()
"""


def measured(folder: Path, rows: int, *arguments: str, killed_at: int | None = None) -> dict[str, Any]:
    """Run a command; its time, its rate, the largest memory in MiB of the driver and of any worker, and its JSON."""
    handed = folder / "handed"
    handed.unlink(missing_ok=True)
    command = [sys.executable, *(("-c", _TIMED) if arguments[0] == "run" else ("-m", "sdbatch")), *arguments]
    began, at = time.monotonic(), time.time()
    with (folder / "log.txt").open("ab") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=log)
    with memory(process.pid) as peaks:
        if killed_at is not None:
            kill_at(process, open_store(str(folder / "out")), killed_at)
        told = process.communicate()[0]
    seconds = time.monotonic() - began
    found: dict[str, Any] = {"seconds": round(seconds, 1), **dict(sorted(peaks.items()))}
    if handed.exists():
        found["to the first shard, s"] = round(float(handed.read_text()) - at, 1)
    if rows:
        found["rows/s"] = round(rows / (seconds - found.get("to the first shard, s", 0)))
    if killed_at is None:
        assert process.returncode == 0, f"{arguments} ended with {process.returncode}"
        found["told"] = json.loads(told)
    return found


def kill_at(process: subprocess.Popen[bytes], store: Any, images: int) -> None:
    """SIGKILL for driver, raylet and actors once so many images are committed."""
    while read_status(store).committed < images:
        assert process.poll() is None, "the run ended before the half"
        time.sleep(1)
    for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            member.kill()


@contextmanager
def memory(driver: int) -> Iterator[dict[str, int]]:
    """The largest resident memory, in MiB, of the driver and of each kind of worker, looked at twice a second."""
    peaks: dict[str, int] = {}
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.5):
            with suppress(psutil.Error):
                family = psutil.Process(driver).children(recursive=True)
                for process in [psutil.Process(driver), *family]:
                    with suppress(psutil.Error, OSError, StopIteration):
                        name = "driver MiB" if process.pid == driver else kind(process)
                        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                        peak = next(int(line.split()[1]) >> 10 for line in lines if line.startswith("VmHWM"))
                        peaks[name] = max(peaks.get(name, 0), peak)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield peaks
    finally:
        ended.set()
        watcher.join()


def kind(process: psutil.Process) -> str:
    command = " ".join(process.cmdline())
    if "ray::Generator" in command:
        return "generator MiB"
    return "worker MiB" if "ray::" in command else "Ray's own MiB"


def read_by_a_status(output: str) -> tuple[int, int]:
    """Bytes of all objects that a status reads, and the entries of all listings."""
    store, read, listed = open_store(output), 0, 0
    get, entries = store.get, store.list

    def counted_get(key: str) -> bytes:
        nonlocal read
        data = get(key)
        read += len(data)
        return data

    def counted_list(prefix: str = "") -> Iterator[Entry]:
        nonlocal listed
        for entry in entries(prefix):
            listed += 1
            yield entry

    store.get, store.list = counted_get, counted_list  # type: ignore[method-assign]
    read_status(store)
    return read, listed


def ledger(output: str) -> dict[str, Any]:
    """Objects and bytes below ``_sdbatch/``, folder by folder."""
    found: dict[str, Any] = {}
    for entry in open_store(output).list("_sdbatch/"):
        folder = entry.key.split("/")[1]
        objects, size = found.get(folder, (0, 0))
        found[folder] = (objects + 1, size + entry.size)
    return {name: {"objects": objects, "bytes": size} for name, (objects, size) in found.items()}


if __name__ == "__main__":
    main()
