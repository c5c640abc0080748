"""The waterfall: techniques added one after the other, each kept where it makes pictures faster and jobs can use it."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from sdbatch.bench.clock import Requests, Setting, Timing, draws, measure, psnr
from sdbatch.bench.floor import settle
from sdbatch.bench.sizes import load_subject
from sdbatch.bench.subject import Subject
from sdbatch.bench.techniques import TECHNIQUES, Technique
from sdbatch.diffusion.checkpoint import Checkpoint
from sdbatch.errors import SdbatchError

#: What a technique must bring to be kept; less is noise.
_LEAST_GAIN = 1.01
#: Coarser numbers whose pictures are further than this (decibels) from those of the first row are never kept: the
#: quality gate. What only adds up in another order may be further off with weights that nothing was learnt by.
LEAST_PSNR = 30.0

Found = TypeVar("Found")

_REFERENCE_PROMPTS = ["a red circle on a white background", "a large blue star above a small green ring"]


@dataclass(frozen=True)
class Row:
    """A technique on top of those kept before it, or a batch size; or why that could not be measured."""

    name: str
    timing: Timing | None = None
    psnr: float | None = None  # of the pictures, against the first row's; None: the same to the bit
    kept: bool = False
    lacking: str | None = None
    in_jobs: bool = True  # can a job work so?
    same_bytes: bool | None = None  # as those made one batch after the other, where that was looked at


def waterfall(
    checkpoint: Checkpoint,
    setting: Setting,
    batch: int,
    runs: int,
    techniques: Sequence[Technique] = TECHNIQUES,
) -> Iterator[tuple[Row, tuple[Technique, ...]]]:
    """Rows as they are measured, each with the techniques kept so far. What can't be measured ends nothing.

    What jobs always do is kept whatever it brings, and what no job can do never is: kept is how a job would work.
    """
    requests = Requests()

    def looked_at(tried: Sequence[Technique]) -> tuple[Timing, np.ndarray] | str:
        return attempt(lambda: _measured(prepared(checkpoint, setting, tried), setting, batch, runs, requests))

    kept: tuple[Technique, ...] = ()
    found = looked_at(kept)
    if isinstance(found, str):  # what saves memory may be measured all the same
        best, reference = float("inf"), None
        yield Row("eager", lacking=found), kept
    else:
        best, reference = min(found[0].seconds), found[1]
        yield Row("eager", found[0], kept=True), kept
    for technique in techniques:
        row = partial(Row, technique.name, in_jobs=technique.in_jobs(setting.device))
        tried = (*(other for other in kept if technique.of is None or other.of != technique.of), technique)
        reason = technique.lacking(checkpoint, setting)
        found = looked_at(tried) if reason is None else reason
        if isinstance(found, str):
            yield row(lacking=found), kept
            continue
        timing, pictures = found
        distance = None if reference is None else psnr(pictures, reference)
        faithful = not technique.coarser or (reference is not None and (distance is None or distance >= LEAST_PSNR))
        better = faithful and _LEAST_GAIN * min(timing.seconds) < best  # the fastest: what else runs only slows
        stays = setting.device in technique.always or (better and technique.in_jobs(setting.device))
        if stays:
            kept, best = tried, min(timing.seconds)
        yield row(timing, distance, stays), kept


def by_batch(
    checkpoint: Checkpoint, setting: Setting, kept: Sequence[Technique], batches: Sequence[int], runs: int
) -> Iterator[Row]:
    """The techniques that were kept, at other batch sizes."""
    for batch in batches:

        def timed(batch: int = batch) -> Timing:
            return measure(draws(prepared(checkpoint, setting, kept), setting), setting, batch, runs, Requests())

        timing = attempt(timed)
        yield Row(f"batch {batch}", lacking=timing) if isinstance(timing, str) else Row(f"batch {batch}", timing)


def attempt(measure: Callable[[], Found]) -> Found | str:
    """What is measured, or in short why it can't be. Of what failed nothing stays in memory: its traceback would keep
    the model. Raises SdbatchError: what the user asked for is wrong in all rows."""
    try:
        return measure()
    except SdbatchError:
        raise
    except Exception as error:  # a kernel's, a compiler's, a lack of memory: the next row is another try
        told = _short(error)
    free()
    return told


def free() -> None:
    """Give back what models that are gone have left, in the compiler's caches and the allocator's."""
    if "torch._dynamo" in sys.modules:  # takes seconds to import
        torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def prepared(checkpoint: Checkpoint, setting: Setting, techniques: Sequence[Technique]) -> Subject:
    """A model with these techniques, as a process that has just started would have it."""
    free()
    subject = load_subject(checkpoint, setting.device, setting.dtype)
    for technique in techniques:
        technique.apply(subject)
    return subject


def phases(subject: Subject, setting: Setting, batch: int) -> dict[str, float]:
    """Seconds of reading a batch's prompts, of one look of the U-Net, and of decoding."""
    factor = subject.vae.config.downscale
    latents = torch.randn(
        batch, subject.vae.config.latent_channels, setting.height // factor, setting.width // factor
    ).to(subject.device)
    requests = Requests()
    prompts, _ = requests.batch(batch)
    size = setting.width, setting.height
    guided = setting.guidance > 1
    conditioning = subject.encode(prompts, size=size)
    if guided:
        conditioning = subject.encode([""] * batch, size=size, negative=True) + conditioning
    conditioning = subject.with_keys_values(conditioning)
    z = torch.cat([latents, latents]) if guided else latents
    works: dict[str, Callable[[], object]] = {
        "text": lambda: subject.encode(requests.batch(batch)[0], size=size),
        "step": lambda: subject.denoise(z, 500.0, conditioning),
        "decoding": lambda: subject.decode(latents),
    }
    taken = {}
    for name, work in works.items():
        seconds = []
        for _ in range(3):
            settle(setting.device)
            began = time.perf_counter()
            work()
            settle(setting.device)
            seconds.append(time.perf_counter() - began)
        taken[name] = min(seconds)
    return taken


def _measured(
    subject: Subject, setting: Setting, batch: int, runs: int, requests: Requests
) -> tuple[Timing, np.ndarray]:
    """Speed, and pictures to compare with those of other rows."""
    draw = draws(subject, setting)
    timing = measure(draw, setting, batch, runs, requests)
    prompts = (_REFERENCE_PROMPTS * batch)[:batch]
    return timing, draw(prompts, list(range(batch)))


def _short(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
