"""The waterfall: techniques added one after the other, each kept where it makes pictures faster."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sdbatch.bench.clock import Requests, Setting, Timing, draws, measure, psnr
from sdbatch.bench.floor import settle
from sdbatch.bench.sizes import load_subject
from sdbatch.bench.subject import Subject
from sdbatch.bench.techniques import TECHNIQUES, Technique
from sdbatch.diffusion.checkpoint import Checkpoint

#: What a technique must bring to be kept; less is noise.
_LEAST_GAIN = 1.01
#: Coarser numbers whose pictures are further than this (decibels) from those of the first row are never kept: the
#: quality gate. What only adds up in another order may be further off with weights that nothing was learnt by.
LEAST_PSNR = 30.0

_REFERENCE_PROMPTS = ["a red circle on a white background", "a large blue star above a small green ring"]


@dataclass(frozen=True)
class Row:
    """A technique on top of those kept before it, or a batch size; or why that could not be measured."""

    name: str
    timing: Timing | None = None
    psnr: float | None = None  # of the pictures, against the first row's; None: the same to the bit
    kept: bool = False
    lacking: str | None = None


def waterfall(
    checkpoint: Checkpoint,
    setting: Setting,
    batch: int,
    runs: int,
    techniques: Sequence[Technique] = TECHNIQUES,
) -> Iterator[tuple[Row, tuple[Technique, ...]]]:
    """Rows as they are measured, each with the techniques kept so far."""
    requests = Requests()
    subject = load_subject(checkpoint, setting.device, setting.dtype)
    timing, reference = _measured(subject, setting, batch, runs, requests)
    yield Row("eager", timing, kept=True), ()
    kept: tuple[Technique, ...] = ()
    best = min(timing.seconds)
    for technique in techniques:
        if reason := technique.lacking(subject):
            yield Row(technique.name, lacking=reason), kept
            continue
        tried = (*(other for other in kept if technique.of is None or other.of != technique.of), technique)
        del subject
        failure = ""
        try:
            subject = prepared(checkpoint, setting, tried)
            timing, pictures = _measured(subject, setting, batch, runs, requests)
        except Exception as error:  # of a kernel, a compiler: whatever it is, the rows after it can be measured
            failure = _short(error)
        if failure:  # out of the exception, which held the model
            subject = prepared(checkpoint, setting, kept)
            yield Row(technique.name, lacking=failure), kept
            continue
        distance = psnr(pictures, reference)
        faithful = not technique.coarser or distance is None or distance >= LEAST_PSNR
        better = faithful and _LEAST_GAIN * min(timing.seconds) < best  # the fastest: what else runs only slows
        if better:
            kept, best = tried, min(timing.seconds)
        yield Row(technique.name, timing, distance, better), kept


def by_batch(
    checkpoint: Checkpoint, setting: Setting, kept: Sequence[Technique], batches: Sequence[int], runs: int
) -> Iterator[Row]:
    """The techniques that were kept, at other batch sizes, until one does not fit."""
    for batch in batches:
        subject = prepared(checkpoint, setting, kept)
        try:
            yield Row(f"batch {batch}", measure(draws(subject, setting), setting, batch, runs, Requests()))
        except torch.OutOfMemoryError:
            yield Row(f"batch {batch}", lacking="does not fit the device's memory")
            return


def prepared(checkpoint: Checkpoint, setting: Setting, techniques: Sequence[Technique]) -> Subject:
    """A model with these techniques, as a process that has just started would have it."""
    gc.collect()
    if setting.device == "cuda":
        torch.cuda.empty_cache()
    if "torch._dynamo" in sys.modules:  # takes seconds to import
        torch._dynamo.reset()
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
