"""A job under fire: ``python -m tests.chaos [--images N] [--minutes M] [--seed S]``, or ``make chaos``.

The same job runs twice with the real built-in model: once in peace into a folder, once into an S3 server behind a
proxy that breaks a fifth of all requests, while actors, the raylet and the driver are killed by SIGKILL and the store
goes away for seconds, by chance from the seed. A killed driver is started again with the same command. In the end
nothing may be lost or doubled, and every picture must have the bytes of the peaceful run. Exit code 0 if so.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import boto3
import psutil
import pyarrow.parquet as pq
import yaml

from sdbatch.storage import Store, open_store
from tests.fault_proxy import FaultProxy
from tests.s3_server import serving

#: A fifth of all requests meets one of these.
FAULTS = {
    "503 SlowDown": 0.07,
    "500 InternalError": 0.04,
    "reset before": 0.03,
    "reset amid": 0.03,
    "reset after": 0.03,
}
#: What is done next, and how often.
STROKES = {"actor": 6, "driver": 2, "raylet": 1, "outage": 2}
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart", "ring", "cross")


@dataclass
class Figures:
    """What a run under fire went through and how it ended."""

    images: int
    seconds_in_peace: float
    seconds_under_fire: float
    strokes: dict[str, int]
    actors_killed: int  # by themselves or with their raylet or driver
    drivers: int  # started, one after the other
    images_computed: int
    images_computed_again: int
    batch_size: int
    faults: dict[str, int]
    verified: bool
    lost: int
    doubled: int
    different: int

    @property
    def ok(self) -> bool:
        return self.verified and not (self.lost or self.doubled or self.different)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--minutes", type=float, default=8.0, help="strokes fall for so long at most")
    parser.add_argument("--pause", type=float, default=15.0, help="seconds between strokes, on average")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--folder", type=Path, default=Path(".work/chaos"))
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    figures = under_fire(
        options.folder.absolute(), options.images, 60 * options.minutes, options.pause, options.seed, options.steps
    )
    print(json.dumps({"ok": figures.ok, **asdict(figures)}, indent=2))
    return 0 if figures.ok else 1


def under_fire(folder: Path, images: int, seconds: float, pause: float, seed: int, steps: int) -> Figures:
    """Run the job in peace and under fire, in ``folder``, and compare."""
    job = _job(folder, images, steps)
    began = time.monotonic()
    _sdbatch(folder, job, folder / "peace", {}).wait()
    in_peace = time.monotonic() - began
    expected = _sums(open_store(str(folder / "peace")))
    assert len(expected) == images, f"the peaceful run made {len(expected)} of {images}"

    chance, strokes, faults = random.Random(seed), Counter[str](), Counter[str]()
    with serving() as server, FaultProxy.start(server["AWS_ENDPOINT_URL"], seed) as proxy, _environment(server):
        boto3.client("s3").create_bucket(Bucket="chaos")
        proxy.set(FAULTS)
        through_proxy = {**server, "AWS_ENDPOINT_URL": proxy.endpoint, "BATCHES": str(folder / "batches.txt")}
        began = time.monotonic()
        killed, drivers = _fire(folder, job, through_proxy, proxy, chance, seconds, pause, strokes)
        under = time.monotonic() - began
        faults = proxy.counts()
        verdict = _verify("s3://chaos/out")
        found = _sums(open_store("s3://chaos/out"))
    computed = Counter(name for line in (folder / "batches.txt").read_text().splitlines() for name in line.split())
    return Figures(
        images=images,
        seconds_in_peace=round(in_peace, 1),
        seconds_under_fire=round(under, 1),
        strokes=dict(sorted(strokes.items())),
        actors_killed=killed,
        drivers=drivers,
        images_computed=computed.total(),
        images_computed_again=computed.total() - len(computed),
        batch_size=yaml.safe_load(job.read_text())["resources"]["batch_size"],
        faults=dict(sorted(faults.items())),
        verified=verdict["ok"],
        lost=len(expected.keys() - found.keys()),
        doubled=len(verdict["doubled"]),
        different=sum(found[name] != sha256 for name, sha256 in expected.items() if name in found),
    )


def _fire(
    folder: Path,
    job: Path,
    environment: dict[str, str],
    proxy: FaultProxy,
    chance: random.Random,
    seconds: float,
    pause: float,
    strokes: Counter[str],
) -> tuple[int, int]:
    """Strokes until the job is done, none after ``seconds``; returns the actors killed and the drivers started."""
    killed, drivers, began = 0, 1, time.monotonic()
    driver = _sdbatch(folder, job, "s3://chaos/out", environment)
    following = chance.expovariate(1 / pause)
    while True:
        with suppress(subprocess.TimeoutExpired):
            code = driver.wait(timeout=following)
            if code == 0:
                return killed, drivers
            print(f"driver {drivers} ended with {code}", file=sys.stderr)
            driver, drivers = _sdbatch(folder, job, "s3://chaos/out", environment), drivers + 1
            continue
        following = chance.expovariate(1 / pause)
        if time.monotonic() - began > seconds:
            continue
        family = psutil.Process(driver.pid).children(recursive=True)
        actors = [process for process in family if _is(process, "ray::Generator")]
        stroke = chance.choices(list(STROKES), list(STROKES.values()))[0]
        if stroke == "outage":
            proxy.outage(chance.uniform(2, 12), hang=chance.random() < 0.5)
        elif stroke == "actor" and actors:
            _kill([chance.choice(actors)])
            killed += 1
        elif stroke == "raylet" and (raylets := [process for process in family if _is(process, "raylet/raylet")]):
            _kill(raylets)
            killed += len(actors)
        elif stroke == "driver":
            _kill([psutil.Process(driver.pid)])  # what it started may live on for seconds, and write
            killed += len(actors)
        else:
            continue
        strokes[stroke] += 1
        print(f"{time.monotonic() - began:6.1f} s  {stroke}", file=sys.stderr)


def _job(folder: Path, images: int, steps: int) -> Path:
    with (folder / "prompts.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "prompt"])
        for i in range(images):
            table.writerow([f"p{i}", f"a {COLOURS[i % 8]} {SHAPES[i // 8 % 8]} on a white background"])
    spec = {
        "name": "chaos",
        "input": {"uri": str(folder / "prompts.csv"), "columns": {"id": "id"}},
        "generate": {"num_inference_steps": steps, "seed": 7},
        "output": {"uri": "set below", "format": "webdataset", "shard_size": 64},
        "resources": {"actors": 2, "batch_size": 8},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def _sdbatch(folder: Path, job: Path, output: Path | str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """The run command in a process of its own, its words in a log."""
    command = [sys.executable, "-m", "sdbatch", "run", str(job), "--set", f"output.uri={output}"]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **environment, "PYTHONPATH": path},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _verify(output: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "sdbatch", "verify", output, "--json"]
    told: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=False).stdout)
    return told


def _sums(store: Store) -> dict[str, str]:
    """Image id → sha256 of the stored bytes."""
    rows = (
        row
        for entry in store.list("metadata/")
        for row in pq.read_table(io.BytesIO(store.get(entry.key)), columns=["image_id", "sha256"]).to_pylist()
    )
    return {row["image_id"]: row["sha256"] for row in rows}


@contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _is(process: psutil.Process, name: str) -> bool:
    with suppress(psutil.Error):
        return name in " ".join(process.cmdline())
    return False


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


if __name__ == "__main__":
    sys.exit(main())
