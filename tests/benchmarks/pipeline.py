"""What the pipeline costs: ``sdbatch run`` next to a bare loop over ``LatentDiffusion.generate``.

    python -m tests.benchmarks.pipeline [IMAGES] [ROUNDS]

Both make the same pictures from the same requests in the same batches, in two processes of one thread each;
the two alternate, round after round, and start-up is told apart. Nothing here is asserted: machines are noisy.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

PROCESSES, BATCH, SHARD, STEPS = 2, 8, 32, 20


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


def bare_loop(prompts: list[str]) -> float:
    """Seconds from the common start until the last process is done."""
    context = get_context("spawn")
    start, results = context.Barrier(PROCESSES), context.Queue()
    share = -(-len(prompts) // PROCESSES)
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


def pipeline(folder: Path, prompts: list[str]) -> tuple[float, float]:
    """Seconds of making, and of starting, that ``sdbatch run`` reports."""
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
    spec = {
        "name": "bench",
        "input": {"uri": str(folder / "prompts.txt")},
        "generate": {"num_inference_steps": STEPS, "guidance_scale": 5.0, "sampler": "dpmpp_2m"},
        "output": {"uri": str(folder / "out"), "shard_size": SHARD},
        "resources": {"actors": PROCESSES, "batch_size": BATCH},
    }
    (folder / "job.yaml").write_text(json.dumps(spec))  # JSON is YAML
    command = [sys.executable, "-m", "sdbatch", "run", str(folder / "job.yaml"), "--json"]
    told = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout)
    return told["making_seconds"], told["starting_seconds"]


def main(images: int, rounds: int) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    prompts = [f"a {('red', 'green', 'blue')[i % 3]} circle on a white background" for i in range(images)]
    bare, made, started = [], [], []
    for number in range(rounds):
        bare.append(bare_loop(prompts))
        with tempfile.TemporaryDirectory() as folder:
            making, starting = pipeline(Path(folder), prompts)
        made.append(making)
        started.append(starting)
        print(
            f"round {number + 1}: bare {images / bare[-1]:.2f} images/s, sdbatch run {images / making:.2f} images/s "
            f"after {starting:.1f} s to start, {making / bare[-1]:.3f} × the bare loop's time",
            flush=True,
        )
    ratios = [making / alone for making, alone in zip(made, bare, strict=True)]
    print(
        f"median of {rounds}: bare {images / statistics.median(bare):.2f} images/s, "
        f"sdbatch run {images / statistics.median(made):.2f} images/s, {statistics.median(ratios):.3f} × "
        f"(from {min(ratios):.3f} to {max(ratios):.3f}), {statistics.median(started):.1f} s to start"
    )


if __name__ == "__main__":
    main(*(int(word) for word in (sys.argv[1:] + ["512", "3"][len(sys.argv) - 1 :])))
