"""Timing: batches of pictures made from prompt to pixels, and what they take of memory."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdbatch.bench.floor import settle
from sdbatch.bench.subject import Subject


@dataclass(frozen=True)
class Setting:
    """What is made, and on what."""

    width: int
    height: int
    steps: int
    guidance: float
    sampler: str
    device: str
    dtype: str
    threads: int

    @property
    def evaluations(self) -> int:
        """How often the U-Net looks at a picture."""
        looks = self.steps * 2 - 1 if self.sampler == "heun" else self.steps
        return looks * (2 if self.guidance > 1 else 1)

    @property
    def generation(self) -> dict[str, Any]:
        """As ``LatentDiffusion.generate`` is told."""
        return {
            "width": self.width,
            "height": self.height,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "sampler": self.sampler,
        }


@dataclass(frozen=True)
class Timing:
    """Batches of one size. ``cold``: seconds of the first, with all that is compiled or chosen then."""

    batch: int
    cold: float
    seconds: list[float]
    peak_bytes: int | None = None

    @property
    def images_a_second(self) -> float:
        return self.batch / statistics.median(self.seconds)

    def told(self) -> dict[str, object]:
        slowest, fastest = self.batch / max(self.seconds), self.batch / min(self.seconds)
        rate = {"images_a_second": round(self.images_a_second, 4), "from": round(slowest, 4), "to": round(fastest, 4)}
        return {**asdict(self), **rate}


#: Prompts and seeds.
Batch = tuple[Sequence[str], Sequence[int]]
#: Makes a batch of pictures (B, H, W, 3) uint8 of these prompts and seeds.
Draw = Callable[[Sequence[str], Sequence[int]], np.ndarray]


def draws(subject: Subject, setting: Setting) -> Draw:
    """How our model makes them."""

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        pictures: np.ndarray = subject.generate(prompts, seeds=seeds, **setting.generation)
        return pictures

    return draw


@dataclass
class Requests:
    """Prompts that never come twice: what is read once a prompt is read for each."""

    numbers: count[int] = field(default_factory=count)

    def batch(self, size: int) -> tuple[list[str], list[int]]:
        chosen = [next(self.numbers) for _ in range(size)]
        return [f"a small red circle beside blue ring number {number}" for number in chosen], chosen


def measure(draw: Draw, setting: Setting, batch: int, runs: int, requests: Requests) -> Timing:
    """Make a batch to warm up, then ``runs`` more."""
    with Peak(setting.device) as peak:
        cold = once(draw, setting, batch, requests)
        seconds = [once(draw, setting, batch, requests) for _ in range(runs)]
    return Timing(batch, cold, seconds, peak.bytes)


def once(draw: Draw, setting: Setting, batch: int, requests: Requests) -> float:
    """Seconds of one batch."""
    prompts, seeds = requests.batch(batch)
    settle(setting.device)
    began = time.perf_counter()
    draw(prompts, seeds)
    settle(setting.device)
    return time.perf_counter() - began


class Peak:
    """The most memory in here: what torch hands out on a GPU, what the process holds elsewhere (Linux only)."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.bytes: int | None = None

    def __enter__(self) -> Peak:
        gc.collect()
        if self._device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            try:
                Path("/proc/self/clear_refs").write_text("5")  # begins a new peak
            except OSError:
                self._device = ""
        return self

    def __exit__(self, *raised: object) -> None:
        if self._device == "cuda":
            self.bytes = torch.cuda.max_memory_allocated()
        elif self._device:
            lines = Path("/proc/self/status").read_text().splitlines()
            self.bytes = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def psnr(pictures: np.ndarray, reference: np.ndarray) -> float | None:
    """How far pictures (B, H, W, 3) uint8 are from others, in decibels; None where they are the same to the bit."""
    error = float(np.mean((pictures.astype(np.float64) - reference) ** 2))
    return 10 * float(np.log10(255**2 / error)) if error else None
