"""What the pipeline costs: ``sdbatch run`` beside a bare loop over ``LatentDiffusion.generate``.

    python -m tests.benchmarks.pipeline [IMAGES] [ROUNDS] [PROCESSES]

Both make the same pictures from the same requests in the same batches, in as many processes of one thread each, and
each has the machine for itself in its turns: every three seconds the processes of one are stopped, and those of the
other go on. So a machine whose speed changes by the minute is as fast for one as for the other. What is counted is time
of a party's own turns, its first batch and its last shard included; start-up is told apart. With fewer processes than
cores each model has a core of its own, as a GPU would be; with as many it shares them with Ray. The share of the run's
time in which the threads of its models had a core says how long they waited.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil

from sdbatch.engine.cluster import ALLOCATOR
from sdbatch.ledger.runs import read_runs
from sdbatch.storage import open_store

BATCH, SHARD, STEPS = 8, 32, 20
TURN = 3


def bare_worker(prompts: list[str], loaded: Any, start: Any, results: Any) -> None:
    import torch

    from sdbatch.diffusion import LatentDiffusion

    torch.set_num_threads(1)
    model = LatentDiffusion.from_pretrained("builtin:shapes")
    loaded.wait()
    start.wait()
    began = time.time()
    for at in range(0, len(prompts), BATCH):
        model.generate(
            prompts[at : at + BATCH],
            seeds=list(range(at, min(at + BATCH, len(prompts)))),
            num_inference_steps=STEPS,
            guidance_scale=5.0,
            sampler="dpmpp_2m",
        )
    results.put((began, time.time()))


class Party:
    """Processes that have turns, each with all that it started."""

    def __init__(self, pids: list[int]) -> None:
        self._roots = [psutil.Process(pid) for pid in pids]
        self._turns = list[list[float]]()  # when each began and ended

    def processes(self) -> list[psutil.Process]:
        found = list[psutil.Process]()
        for root in self._roots:
            with suppress(psutil.NoSuchProcess):
                found += [root, *root.children(recursive=True)]
        return found

    def go(self) -> None:
        self._send(signal.SIGCONT)
        self._turns.append([time.time(), float("inf")])

    def stop(self) -> None:
        self._turns[-1][1] = time.time()
        self._send(signal.SIGSTOP)
        self._send(signal.SIGSTOP)  # and whom someone started between

    def _send(self, number: signal.Signals) -> None:
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def seconds(self, began: float, ended: float) -> float:
        """Of its turns, between two times."""
        return sum(max(min(end, ended) - max(begin, began), 0.0) for begin, end in self._turns)


class Onlooker:
    """How long each thread of a run's actors had a core, look by look."""

    def __init__(self, party: Party) -> None:
        self._party = party
        self._looks = dict[tuple[int, int], list[tuple[float, float]]]()  # process and thread → when, how long so far

    def look(self) -> None:
        for process in self._party.processes():
            with suppress(psutil.NoSuchProcess, OSError):
                if process.name().startswith("ray::Generator"):
                    for thread in Path(f"/proc/{process.pid}/task").iterdir():
                        nanoseconds = int((thread / "schedstat").read_text().split()[0])
                        looks = self._looks.setdefault((process.pid, int(thread.name)), [])
                        looks.append((time.time(), nanoseconds / 1e9))

    @property
    def saw_actors(self) -> bool:
        return bool(self._looks)

    def busy(self) -> float:
        """The share of its turns in which an actor's busiest thread had a core, from a third of them to the last but
        one: the mean of all actors."""
        shares = dict[int, float]()
        longest = max(len(looks) for looks in self._looks.values())
        for (pid, _), looks in self._looks.items():
            if len(looks) < longest // 2:  # a thread that came and went
                continue
            (began, before), (ended, after) = looks[len(looks) // 3], looks[-2]
            shares[pid] = max(shares.get(pid, 0.0), (after - before) / self._party.seconds(began, ended))
        return statistics.mean(shares.values())


def round_of(folder: Path, prompts: list[str], processes: int) -> tuple[float, float, float, float]:
    """Seconds of the bare loop, of making and of starting in ``sdbatch run``, and how busy its models' threads were."""
    context = get_context("spawn")
    loaded, start, results = context.Barrier(processes + 1), context.Event(), context.Queue()
    share = -(-len(prompts) // processes)
    workers = [
        context.Process(target=bare_worker, args=(prompts[at : at + share], loaded, start, results))
        for at in range(0, len(prompts), share)
    ]
    for worker in workers:
        worker.start()
    loaded.wait()
    job = write_job(folder, prompts, processes)
    command = [sys.executable, "-m", "sdbatch", "run", str(job), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as run:
        ours, bare = Party([run.pid]), Party([worker.pid for worker in workers if worker.pid])
        onlooker = Onlooker(ours)
        alternate(ours, bare, run, workers, onlooker, start)
        told = json.loads(run.communicate()[0])
    if run.returncode:
        raise SystemExit(f"sdbatch run ended with {run.returncode}")
    spans = [results.get() for _ in workers]
    (line,) = read_runs(open_store(str(folder / "out")))
    made = line.updated_at - told["making_seconds"]  # when its first model was loaded
    return (
        bare.seconds(min(began for began, _ in spans), max(ended for _, ended in spans)),
        ours.seconds(made, line.updated_at),
        ours.seconds(made - told["starting_seconds"], made),
        onlooker.busy(),
    )


def alternate(ours: Party, bare: Party, run: Any, workers: list[Any], onlooker: Onlooker, start: Any) -> None:
    """Give both their turns until both are done. The bare loop begins when the run's actors are there."""
    ours.go()
    while run.poll() is None:
        for _ in range(TURN):
            time.sleep(1.0)
            onlooker.look()
        if onlooker.saw_actors and any(worker.is_alive() for worker in workers):
            start.set()
            ours.stop()
            bare.go()
            deadline = time.monotonic() + TURN
            while time.monotonic() < deadline and any(worker.is_alive() for worker in workers):
                time.sleep(0.01)
            bare.stop()
            ours.go()
    bare.go()
    for worker in workers:
        worker.join()


def write_job(folder: Path, prompts: list[str], processes: int) -> Path:
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
    spec = {
        "name": "bench",
        "input": {"uri": str(folder / "prompts.txt")},
        "generate": {"num_inference_steps": STEPS, "guidance_scale": 5.0, "sampler": "dpmpp_2m"},
        "output": {"uri": str(folder / "out"), "shard_size": SHARD},
        "resources": {"actors": processes, "batch_size": BATCH},
    }
    (folder / "job.yaml").write_text(json.dumps(spec))  # JSON is YAML
    return folder / "job.yaml"


def main(images: int, rounds: int, processes: int) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("GLIBC_TUNABLES", ALLOCATOR)  # as sdbatch has it for its actors
    prompts = [f"a {('red', 'green', 'blue')[i % 3]} circle on a white background" for i in range(images)]
    ratios, started, shares = list[float](), list[float](), list[float]()
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            alone, making, starting, busy = round_of(Path(folder), prompts, processes)
        ratios.append(making / alone)
        started.append(starting)
        shares.append(busy)
        print(
            f"round {number + 1}: bare {images / alone:.2f} images/s, sdbatch run {images / making:.2f} images/s "
            f"after {starting:.1f} s to start, {making / alone:.3f} × the bare loop's time, "
            f"its models at work for {100 * busy:.1f} % of it",
            flush=True,
        )
    print(
        f"median of {rounds}: {statistics.median(ratios):.3f} × the bare loop's time (from {min(ratios):.3f} to "
        f"{max(ratios):.3f}), {statistics.median(started):.1f} s to start, "
        f"models at work for {100 * statistics.median(shares):.1f} %"
    )


if __name__ == "__main__":
    main(*(int(word) for word in (sys.argv[1:] + ["256", "3", "1"][len(sys.argv) - 1 :])))
