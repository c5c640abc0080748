"""How throughput grows from 1 to 1,000 actors: a simulation from constants that are measured here.

    python -m tests.benchmarks.scaling measure [IMAGES [SECONDS]]   # whole jobs of builtin:null at 1, 2, 4 and 8 actors
    python -m tests.benchmarks.scaling simulate [FILE.json]         # from what that wrote, or from the figures below

What is shared by all actors, and so in the end decides, are three queues: the driver, which hands out shards and takes
receipts; the logbook, which is told of every batch before it begins; and the store, which takes so many requests a
second. Everything else an actor does by itself. The simulation is of these queues, event by event, with actors that
hold ``HELD`` shards as the pool has it; the driver's and the logbook's seconds are measured, the store's rate is given.
"""

from __future__ import annotations

import heapq
import json
import resource
import sys
import tempfile
import time
from collections import deque
from collections.abc import Generator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

from sdbatch.engine.handing import HELD

ACTORS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
MEASURED = (1, 2, 4, 8)
SHARD, BATCH = 64, 8


@dataclass(frozen=True)
class Constants:
    """Seconds of one request to each queue, and how many puts a second the store takes at most."""

    driver: float = 0.004  # a shard: handed out, its receipt taken, its record counted
    logbook: float = 0.0005  # a mark
    round_trip: float = 0.001  # of a mark, beside the queue
    put: float = 0.05
    puts_a_second: float = 3500.0  # what S3 promises a prefix


class Queue:
    """One server: who comes while it is busy waits. Requests come in the order of their times."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.free = seconds, 0.0

    def serve(self, now: float, requests: int = 1) -> float:
        """When the last of these requests, coming now, is done."""
        self.free = max(self.free, now) + self.seconds * requests
        return self.free


class Model:
    """An actor's model: one shard at a time."""

    def __init__(self) -> None:
        self.busy = False
        self.waiting: deque[Process] = deque()


#: A shard on its way: yields when it goes on, or the model whose turn it waits for; is sent the time.
Process = Generator[float | Model, float, None]


def simulate(actors: int, rate: float, constants: Constants, *, shards_each: int = 12, files: bool = True) -> float:
    """Pictures a second of a pool whose models make ``rate`` each; ``files``: a put a picture, else one a batch."""
    driver, logbook, store = Queue(constants.driver), Queue(constants.logbook), Queue(1 / constants.puts_a_second)
    left = actors * shards_each
    events: list[tuple[float, int, Process]] = []
    order = count()

    def shards(model: Model) -> Process:
        nonlocal left
        now = yield 0.0
        while left:
            left -= 1
            now = yield driver.serve(now)
            now = yield model
            stored = now
            for _ in range(SHARD // BATCH):
                now = yield logbook.serve(now) + constants.round_trip
                now = yield now + BATCH / rate
                stored = max(stored, store.serve(now, BATCH if files else 1) + constants.put)
            model.busy = bool(model.waiting)  # the next in line has it at once
            if model.waiting:
                go_on(model.waiting.popleft(), now)
            now = yield stored
            now = yield store.serve(now, 2) + 2 * constants.put  # metadata, then the record

    def go_on(process: Process, now: float) -> None:
        """Let it act at ``now``, and note when it will again."""
        wants = next(process, None) if now < 0 else _sent(process, now)
        while isinstance(wants, Model) and not wants.busy:
            wants.busy = True
            wants = _sent(process, now)
        if isinstance(wants, Model):
            wants.waiting.append(process)
        elif wants is not None:
            heapq.heappush(events, (wants, next(order), process))

    for model in [Model() for _ in range(actors)]:
        for _ in range(HELD):
            go_on(shards(model), -1.0)
    now = 0.0
    while events:
        now, _, process = heapq.heappop(events)
        go_on(process, now)
    return actors * shards_each * SHARD / now


def _sent(process: Process, now: float) -> float | Model | None:
    try:
        return process.send(now)
    except StopIteration:
        return None


def bend(rate: float, constants: Constants, *, files: bool) -> list[tuple[int, float, float]]:
    """Actors, pictures a second, and their share of what one actor's rate promises."""
    alone = simulate(1, rate, constants, files=files)
    return [(n, made := simulate(n, rate, constants, files=files), made / (n * alone)) for n in ACTORS]


def job(actors: int, images: int) -> dict[str, float]:
    """A whole job of builtin:null in this process as driver: its rate, and the driver's CPU time a shard."""
    from sdbatch.engine import runner
    from sdbatch.spec import parse_spec

    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "prompts.txt"
        table.write_text("\n".join(f"a red circle {number}" for number in range(images)) + "\n")
        spec = parse_spec(
            {
                "name": "scaling",
                "input": {"uri": str(table)},
                "model": {"uri": "builtin:null"},
                "generate": {"width": 64, "height": 64},
                "output": {"uri": f"{folder}/out", "shard_size": SHARD, "format": "webdataset"},
                "resources": {"actors": actors, "batch_size": BATCH},
            }
        )
        runner.plan(spec, lambda now: None)
        before = resource.getrusage(resource.RUSAGE_SELF)
        outcome = runner.run(spec, lambda now: None)
        after = resource.getrusage(resource.RUSAGE_SELF)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return {
            "actors": actors,
            "images_a_second": round(images / outcome.making_seconds, 1),
            "driver_cpu_a_shard": round(cpu / (images / SHARD), 5),
        }


def marks(times: int = 2000) -> tuple[float, float]:
    """Seconds of a mark in the logbook: its share of the logbook's time when many ask, and the wait of one alone."""
    import ray

    from sdbatch.engine.making.logbook import Mark, Pen, open_logbook

    logbook = open_logbook({})
    pen, mark = Pen(logbook, 1), Mark("0000000", 0, alone=False)
    pen.at(mark)
    began = time.perf_counter()
    for _ in range(times // 4):
        pen.at(mark)
    alone = (time.perf_counter() - began) / (times // 4)
    began = time.perf_counter()
    ray.get([logbook.write.remote(1, mark) for _ in range(times)])
    return (time.perf_counter() - began) / times, alone


def measure(images: int, seconds: float) -> dict[str, object]:
    """The constants, on one Ray for all jobs; those for which no time is left are left out."""
    from sdbatch.engine.cluster import ray_session
    from sdbatch.spec import Resources

    began, jobs = time.perf_counter(), list[dict[str, float]]()
    with ray_session(Resources(actors=MEASURED[-1])):
        queued, alone = marks()
        tell(f"a mark takes {1e3 * queued:.3f} ms of the logbook, {1e3 * alone:.3f} ms alone")
        for actors in MEASURED:
            taken = time.perf_counter() - began
            if jobs and taken + 1.5 * taken / len(jobs) > seconds:
                tell(f"no time left for {actors} actors")
                break
            jobs.append(job(actors, images))
            tell(", ".join(f"{name} {value:g}" for name, value in jobs[-1].items()))
    least = min(found["driver_cpu_a_shard"] for found in jobs)
    constants = Constants(driver=least, logbook=round(queued, 6), round_trip=round(max(alone - queued, 0.0), 6))
    return {"jobs": jobs, "constants": asdict(constants)}


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(verb: str, *rest: str) -> None:
    if verb == "measure":
        images, seconds = (int(word) for word in [*rest, *("16384", "540")[len(rest) :]])
        print(json.dumps(measure(images, seconds), indent=2))
        return
    constants = Constants(**json.loads(Path(rest[0]).read_text())["constants"]) if rest else Constants()
    print(constants)
    for model, rate, files in (
        ("SDXL, 1.6 images/s each, files", 1.6, True),
        ("SD 1.5, 11 images/s each, files", 11.0, True),
        ("SD 1.5, 11 images/s each, WebDataset", 11.0, False),
        ("builtin:null, 1,000 images/s each, WebDataset", 1000.0, False),
    ):
        print(model)
        for actors, made, share in bend(rate, constants, files=files):
            print(f"  {actors:>5} actors {made:>10,.1f} images/s  {100 * share:5.1f} %")


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["simulate"]))
