"""Does the model wait for the store? One actor with the built-in model, its store at once and with 2 s a put.

    python -m tests.benchmarks.slow_store [IMAGES] [ROUNDS]

Shards are handed out as the pool does it, to one actor without Ray. In a round both stores are at work at once, each
in a process and on a core of its own, and then once more with the cores swapped. So the machine is as fast for the one
as for the other, and both halves together tell what the store alone does. Throughput is that of the model: pictures
over the time from its first batch to its last; what is stored after that is told apart.
"""

from __future__ import annotations

import math
import os
import queue
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from sdbatch.engine.cluster import ALLOCATOR
from sdbatch.engine.handing import HELD
from sdbatch.ledger import Shard
from sdbatch.storage import LocalStore
from tests.benchmarks.planned import generator, plan

BATCH, SHARD, STEPS, SLOW = 8, 32, 20, 2.0


class SlowStore(LocalStore):
    """Every put takes ``seconds`` more."""

    seconds = 0.0

    def put(self, key: str, data: bytes) -> None:
        time.sleep(self.seconds)
        super().put(key, data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        time.sleep(self.seconds)
        return super().put_if_absent(key, data)


def run(images: int, seconds: float) -> tuple[float, float, float, float]:
    """Pictures a second of the model, its idle share, its milliseconds of CPU a picture, and how long the last picture
    took to be committed after it."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        spec, job, shards = plan(
            root,
            images,
            SHARD,
            generate={"num_inference_steps": STEPS},
            resources={"batch_size": BATCH},
        )
        actor = generator(spec, job)
        store = SlowStore(root)
        store.seconds = seconds
        actor.store = actor._committer._store = actor._committer.writer.store = store
        spans: list[tuple[float, float]] = []
        cpu = list[float]()
        draw = actor.model.draw

        def timed(*given: Any) -> Any:
            began, worked = time.perf_counter(), time.thread_time()
            drawn = draw(*given)
            spans.append((began, time.perf_counter()))
            cpu.append(time.thread_time() - worked)
            return drawn

        actor.model.draw = timed  # type: ignore[method-assign]
        waiting: queue.SimpleQueue[Shard | None] = queue.SimpleQueue()
        for shard in [*shards, *[None] * HELD]:
            waiting.put(shard)

        def serve() -> None:
            while (shard := waiting.get()) is not None:
                actor.run_shard(shard)

        servers = [threading.Thread(target=serve) for _ in range(HELD)]
        for server in servers:
            server.start()
        for server in servers:
            server.join()
        first, last = spans[0][0], spans[-1][1]
        idle = 1 - sum(end - began for began, end in spans) / (last - first)
        return images / (last - first), idle, 1e3 * sum(cpu) / images, time.perf_counter() - last


def worker(images: int, core: int, seconds: float, start: Any, results: Any) -> None:
    os.sched_setaffinity(0, {core})
    start.wait()
    results.put((seconds, run(images, seconds)))


def side_by_side(images: int, cores: Sequence[int]) -> float:
    """Throughput with the slow store over that with the quick one; each on its core, both at the same time."""
    context = get_context("spawn")
    start, results = context.Barrier(2), context.Queue()
    stores = dict(zip((0.0, SLOW), cores, strict=True))
    workers = [
        context.Process(target=worker, args=(images, core, seconds, start, results)) for seconds, core in stores.items()
    ]
    for process in workers:
        process.start()
    rates = dict[float, float]()
    for seconds, (rate, idle, cpu, after) in sorted(results.get() for _ in workers):
        rates[seconds] = rate
        print(
            f"{seconds:g} s a put: {rate:.3f} images/s, the model idle for {100 * idle:.1f} % of its time, "
            f"{cpu:.0f} ms of its CPU a picture, the last picture committed {after:.1f} s after it",
            flush=True,
        )
    for process in workers:
        process.join()
    return rates[SLOW] / rates[0.0]


def main(images: int, rounds: int) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "GLIBC_TUNABLES": ALLOCATOR}  # as an actor has it
    cores = sorted(os.sched_getaffinity(0))[:2]
    falls = list[float]()
    for _ in range(rounds):
        ratio = math.sqrt(side_by_side(images, cores) * side_by_side(images, cores[::-1]))
        falls.append(100 * (1 - ratio))
        print(f"throughput falls by {falls[-1]:.1f} % in this round", flush=True)
    print(f"throughput falls by {statistics.median(falls):.1f} % (from {min(falls):.1f} to {max(falls):.1f})")


if __name__ == "__main__":
    main(*(int(word) for word in (sys.argv[1:] + ["96", "4"][len(sys.argv) - 1 :])))
