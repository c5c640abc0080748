"""What an actor adds to the model's own time: its batches beside those of ``LatentDiffusion.generate``.

    python -m tests.benchmarks.drawing [PAIRS] [STEPS]

An actor's inside and its bare model make the same batch one after the other, pair after pair, who begins changing; a
process on each core does so at the same time. Compared is CPU time of the thread that draws, so that what else runs on
the core does not count; the share of a run in which that thread waits tells ``tests.benchmarks.pipeline``. Both have
one copy of the weights: of two copies in a process, one may be some per cent slower, by luck of where they lie. Single
pairs are far apart on a noisy machine, hence many: the median's error is told, too, by resampling them.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from sdbatch.engine.cluster import ALLOCATOR

BATCH, PROMPTS = 8, 512


def worker(core: int, pairs: int, steps: int, results: Any) -> None:
    os.sched_setaffinity(0, {core})
    import torch

    from sdbatch.engine.making.batch import arrived
    from tests.benchmarks.planned import generator, plan

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        spec, job, shards = plan(
            Path(folder), PROMPTS, BATCH, generate={"num_inference_steps": steps}, resources={"batch_size": BATCH}
        )
        actor = generator(spec, job)
        batches = [actor._requests(shard) for shard in shards]

    def by_actor(batch: Sequence[Any]) -> None:
        arrived(actor._maker.make(0, dict(enumerate(batch))))

    def bare(batch: Sequence[Any]) -> None:
        actor.model._model.generate(  # type: ignore[attr-defined]
            [request.prompt for request in batch],
            seeds=[request.seed for request in batch],
            num_inference_steps=steps,
            guidance_scale=5.0,
            sampler="dpmpp_2m",
        )

    def seconds(make: Callable[[Sequence[Any]], None], number: int) -> float:
        began = time.thread_time()
        make(batches[number % len(batches)])
        return time.thread_time() - began

    def compare() -> list[float]:
        makers, ratios = (by_actor, bare), list[float]()
        for number in range(pairs + 1):
            both = {make: seconds(make, number) for make in makers}
            ratios.append(both[by_actor] / both[bare])
            makers = (makers[1], makers[0])
        return ratios[1:]  # the first warms up

    results.put(actor._model_thread.submit(compare).result())


def main(pairs: int, steps: int) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "GLIBC_TUNABLES": ALLOCATOR}  # as an actor has it
    context = get_context("spawn")
    results = context.Queue()
    cores = sorted(os.sched_getaffinity(0))
    workers = [context.Process(target=worker, args=(core, pairs, steps, results)) for core in cores]
    for process in workers:
        process.start()
    ratios = [ratio for _ in workers for ratio in results.get()]
    for process in workers:
        process.join()
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(1000))
    print(
        f"an actor's batch over a bare one, CPU time, {len(ratios)} pairs: {statistics.median(ratios):.4f} "
        f"({medians[25]:.4f} to {medians[974]:.4f} with 95 %), from {min(ratios):.3f} to {max(ratios):.3f}"
    )


if __name__ == "__main__":
    main(*(int(word) for word in (sys.argv[1:] + ["120", "10"][len(sys.argv) - 1 :])))
