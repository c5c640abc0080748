"""Batches back to back, as jobs make them: each is decoded, and copied, beside the next one's denoising."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from sdbatch.bench.clock import Batch, Peak, Requests, Setting, Timing, draws
from sdbatch.bench.floor import settle
from sdbatch.bench.subject import Subject
from sdbatch.diffusion.decoding import Decoder, Drawn

#: What a row of the waterfall calls it.
NAME = "batches back to back, as in jobs"
#: Batches in one go: of the last one nothing is beside.
IN_A_ROW = 4

#: Makes batches of pictures, each (B, H, W, 3) uint8.
DrawAll = Callable[[Sequence[Batch]], list[np.ndarray]]


def draws_back_to_back(subject: Subject, setting: Setting) -> DrawAll:
    """How jobs have our model make them: the one that draws is a batch ahead of the one that is waited for."""
    decode = Decoder(subject)

    def draw(batches: Sequence[Batch]) -> list[np.ndarray]:
        pictures, before = list[np.ndarray](), list[Drawn]()
        for prompts, seeds in batches:
            drawn = decode(subject.generate(prompts, seeds=seeds, output="latent", **setting.generation))
            pictures += [one.wait()[0] for one in before]
            before = [drawn]
        return pictures + [one.wait()[0] for one in before]

    return draw


def measure_back_to_back(subject: Subject, setting: Setting, batch: int, runs: int) -> tuple[Timing, bool]:
    """Seconds of a batch among several, and whether the last of these have the bytes that they have by themselves."""
    requests = Requests()
    together, alone = draws_back_to_back(subject, setting), draws(subject, setting)
    with Peak(setting.device) as peak:
        cold, _ = timed(together, setting, [requests.batch(batch)])
        seconds = []
        for _ in range(runs):
            batches = [requests.batch(batch) for _ in range(IN_A_ROW)]
            taken, pictures = timed(together, setting, batches)
            seconds.append(taken / IN_A_ROW)
    same = all(np.array_equal(alone(*one), made) for one, made in zip(batches, pictures, strict=True))
    return Timing(batch, cold, seconds, peak.bytes), same


def timed(draw: DrawAll, setting: Setting, batches: Sequence[Batch]) -> tuple[float, list[np.ndarray]]:
    """Seconds until all of their pictures are there, and these."""
    settle(setting.device)
    began = time.perf_counter()
    pictures = draw(batches)
    settle(setting.device)
    return time.perf_counter() - began, pictures
