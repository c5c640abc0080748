"""What the pipeline costs: ``sdbatch run`` next to a bare loop over ``LatentDiffusion.generate``.

    python -m tests.benchmarks.pipeline [IMAGES] [ROUNDS] [PROCESSES]

Both make the same pictures from the same requests in the same batches, in as many processes of one thread each;
the two alternate, round after round, and start-up is told apart. With fewer processes than cores each model has a core
of its own, as a GPU would be; with as many it shares them with Ray. Machines are noisy and nothing is asserted; the
share of the run's time in which the threads of its models had a core says how long they waited.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil

BATCH, SHARD, STEPS = 8, 32, 20


def bare_worker(prompts: list[str], seeds: list[int], start: Any, results: Any) -> None:
    import torch

    from sdbatch.diffusion import LatentDiffusion

    torch.set_num_threads(1)
    model = LatentDiffusion.from_pretrained("builtin:shapes")
    start.wait()
    began = time.perf_counter()
    for at in range(0, len(prompts), BATCH):
        model.generate(
            prompts[at : at + BATCH],
            seeds=seeds[at : at + BATCH],
            num_inference_steps=STEPS,
            guidance_scale=5.0,
            sampler="dpmpp_2m",
        )
    results.put((began, time.perf_counter()))


def bare_loop(prompts: list[str], processes: int) -> float:
    """Seconds from the common start until the last process is done."""
    context = get_context("spawn")
    start, results = context.Barrier(processes), context.Queue()
    share = -(-len(prompts) // processes)
    workers = [
        context.Process(target=bare_worker, args=(prompts[at : at + share], list(range(share)), start, results))
        for at in range(0, len(prompts), share)
    ]
    for worker in workers:
        worker.start()
    spans = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    return float(max(end for _, end in spans) - min(begin for begin, _ in spans))


def pipeline(folder: Path, prompts: list[str], processes: int) -> tuple[float, float, float]:
    """Seconds of making and of starting that ``sdbatch run`` tells, and how busy its models' threads were."""
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
    spec = {
        "name": "bench",
        "input": {"uri": str(folder / "prompts.txt")},
        "generate": {"num_inference_steps": STEPS, "guidance_scale": 5.0, "sampler": "dpmpp_2m"},
        "output": {"uri": str(folder / "out"), "shard_size": SHARD},
        "resources": {"actors": processes, "batch_size": BATCH},
    }
    (folder / "job.yaml").write_text(json.dumps(spec))  # JSON is YAML
    command = [sys.executable, "-m", "sdbatch", "run", str(folder / "job.yaml"), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as run:
        onlooker = Onlooker(run.pid)
        onlooker.start()
        written = run.communicate()[0]
    if run.returncode:
        raise SystemExit(f"sdbatch run ended with {run.returncode}")
    told = json.loads(written)
    return told["making_seconds"], told["starting_seconds"], onlooker.busy()


class Onlooker(threading.Thread):
    """Looks once a second at how long each thread of a run's actors had a core."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid = pid
        self._looks = dict[tuple[int, int], list[tuple[float, float]]]()  # process and thread → when, how long so far

    def run(self) -> None:
        with suppress(psutil.NoSuchProcess):
            driver = psutil.Process(self._pid)
            while driver.is_running():
                for process in driver.children(recursive=True):
                    with suppress(psutil.NoSuchProcess, OSError):
                        if process.name().startswith("ray::Generator"):
                            self._look(process.pid)
                time.sleep(1.0)

    def _look(self, pid: int) -> None:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            nanoseconds = int((thread / "schedstat").read_text().split()[0])
            self._looks.setdefault((pid, int(thread.name)), []).append((time.perf_counter(), nanoseconds / 1e9))

    def busy(self) -> float:
        """The share of its time in which an actor's busiest thread had a core, from a third of it to the last but one
        second: the mean of all actors."""
        shares = dict[int, float]()
        longest = max(len(looks) for looks in self._looks.values())
        for (pid, _), looks in self._looks.items():
            if len(looks) < longest // 2:  # a thread that came and went
                continue
            (began, before), (ended, after) = looks[len(looks) // 3], looks[-2]
            shares[pid] = max(shares.get(pid, 0.0), (after - before) / (ended - began))
        return statistics.mean(shares.values())


def main(images: int, rounds: int, processes: int) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    prompts = [f"a {('red', 'green', 'blue')[i % 3]} circle on a white background" for i in range(images)]
    bare, made, started, shares = list[float](), list[float](), list[float](), list[float]()
    for number in range(rounds):
        bare.append(bare_loop(prompts, processes))
        with tempfile.TemporaryDirectory() as folder:
            making, starting, busy = pipeline(Path(folder), prompts, processes)
        made.append(making)
        started.append(starting)
        shares.append(busy)
        print(
            f"round {number + 1}: bare {images / bare[-1]:.2f} images/s, sdbatch run {images / making:.2f} images/s "
            f"after {starting:.1f} s to start, {making / bare[-1]:.3f} × the bare loop's time, "
            f"its models at work for {100 * busy:.1f} % of it",
            flush=True,
        )
    ratios = [making / alone for making, alone in zip(made, bare, strict=True)]
    print(
        f"median of {rounds}: bare {images / statistics.median(bare):.2f} images/s, "
        f"sdbatch run {images / statistics.median(made):.2f} images/s, {statistics.median(ratios):.3f} × "
        f"(from {min(ratios):.3f} to {max(ratios):.3f}), {statistics.median(started):.1f} s to start, "
        f"models at work for {100 * statistics.median(shares):.1f} %"
    )


if __name__ == "__main__":
    main(*(int(word) for word in (sys.argv[1:] + ["256", "3", "1"][len(sys.argv) - 1 :])))
