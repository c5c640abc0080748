"""Does it pay on the CPU to decode a batch in a second thread, beside the next one's denoising?

    python -m tests.benchmarks.decoding [BATCHES] [ROUNDS]

Two processes, as two actors on two cores would be, make the same batches with the built-in model: in one thread, and
with a thread more for decoding. The two take turns, round after round.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from typing import Any

PROCESSES, BATCH, STEPS = 2, 8, 20


def worker(batches: int, beside: list[bool], start: Any, results: Any) -> None:
    import torch

    from sdbatch.diffusion import LatentDiffusion
    from sdbatch.diffusion.decoding import Decoder

    torch.set_num_threads(1)
    model = LatentDiffusion.from_pretrained("builtin:shapes")
    decode, thread = Decoder(model), ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))

    def batch(number: int, apart: bool) -> Any:
        prompts = [f"a red circle above a blue ring {number} {i}" for i in range(BATCH)]
        latents = model.generate(
            prompts, seeds=range(BATCH), num_inference_steps=STEPS, sampler="dpmpp_2m", output="latent"
        )
        return thread.submit(decode, latents) if apart else decode(latents)

    batch(-1, True).result()
    for apart in beside:
        start.wait()
        began = time.perf_counter()
        made = [batch(number, apart) for number in range(batches)]
        for one in made if apart else ():
            one.result()
        results.put((began, time.perf_counter()))


def main(batches: int, rounds: int) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    context, turns = get_context("spawn"), [apart for number in range(rounds) for apart in _turns(number)]
    start, results = context.Barrier(PROCESSES), context.Queue()
    workers = [context.Process(target=worker, args=(batches, turns, start, results)) for _ in range(PROCESSES)]
    for process in workers:
        process.start()
    rates: dict[bool, list[float]] = {False: [], True: []}
    for apart in turns:
        spans = [results.get() for _ in workers]
        seconds = max(end for _, end in spans) - min(begin for begin, _ in spans)
        rates[apart].append(PROCESSES * batches * BATCH / seconds)
        print(f"{'two threads' if apart else 'one thread '}: {rates[apart][-1]:.2f} images/s", flush=True)
    for process in workers:
        process.join()
    ratios = [two / one for one, two in zip(rates[False], rates[True], strict=True)]
    print(f"two threads over one: {statistics.median(ratios):.3f} (from {min(ratios):.3f} to {max(ratios):.3f})")


def _turns(number: int) -> tuple[bool, bool]:
    return (False, True) if number % 2 == 0 else (True, False)


if __name__ == "__main__":
    main(*(int(word) for word in (sys.argv[1:] + ["6", "5"][len(sys.argv) - 1 :])))
