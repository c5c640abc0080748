"""The training loop that both stages share: data-parallel workers, EMA, checkpoints that resume bit for bit.

Everything random in step n comes from (seed, stage, n, rank), so a resumed run sees what the uninterrupted
one saw. State is kept as safetensors, like every other weight of this project.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Loss = Callable[[np.random.Generator], Tensor]
Report = Callable[[int, float, float], None]  # step, loss, seconds a step


@dataclass(frozen=True)
class Plan:
    """How long and how fast a stage learns."""

    stage: str
    steps: int
    learning_rate: float
    warmup: int
    seed: int
    checkpoint_every: int
    ema_decay: float | None = None
    betas: tuple[float, float] = (0.9, 0.99)

    def rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to zero."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def draws(seed: int, *path: int | str) -> np.random.Generator:
    """A generator of its own for every place in the run that needs chance."""
    words = [part if isinstance(part, int) else int.from_bytes(part.encode(), "little") % 2**32 for part in path]
    return np.random.default_rng([seed, *words])


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def worker(number: int, count: int, rendezvous: Path) -> Iterator[None]:
    """Join the group of data-parallel workers; one thread each, for threads that spin starve each other."""
    torch.set_num_threads(1)
    if count > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=number, world_size=count)
    try:
        yield
    finally:
        if count > 1:
            dist.destroy_process_group()


def parallel(module: nn.Module) -> nn.Module:
    """The module with its gradients averaged over the workers."""
    # 1×1 kernels come in two equally good memory layouts; copying between them costs nothing here.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    return DistributedDataParallel(module) if dist.is_initialized() else module


def train(module: nn.Module, loss: Loss, plan: Plan, folder: Path, report: Report) -> dict[str, Tensor]:
    """Minimise ``loss`` over ``module``'s parameters and return the trained (or averaged) weights.

    Goes on from ``folder/{stage}.safetensors`` when it is there.
    """
    parameters = dict(module.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=plan.learning_rate, betas=plan.betas, weight_decay=1e-2)
    averaged = {name: value.detach().clone() for name, value in parameters.items()}
    state_file = folder / f"{plan.stage}.safetensors"
    start = _restore(state_file, parameters, averaged, optimizer) if state_file.exists() else 0
    running, since = 0.0, time.perf_counter()
    for step in range(start, plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(step)
        value = loss(draws(plan.seed, plan.stage, step, rank()))
        optimizer.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        decay = 0.0 if plan.ema_decay is None else min(plan.ema_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            for name, parameter in parameters.items():
                averaged[name].lerp_(parameter, 1 - decay)
        running = value.item() if step == start else 0.98 * running + 0.02 * value.item()
        done = step + 1
        if rank() == 0 and (done % plan.checkpoint_every == 0 or done == plan.steps):
            _save(state_file, done, parameters, averaged, optimizer)
        report(done, running, (time.perf_counter() - since) / (done - start))
    return averaged


def _save(
    path: Path,
    step: int,
    parameters: dict[str, nn.Parameter],
    averaged: dict[str, Tensor],
    optimizer: torch.optim.AdamW,
) -> None:
    tensors = {"step": torch.tensor(step)}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        tensors[f"parameter.{name}"] = parameter.detach()
        tensors[f"averaged.{name}"] = averaged[name]
        tensors[f"moment1.{name}"] = state["exp_avg"]
        tensors[f"moment2.{name}"] = state["exp_avg_sq"]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    safetensors.torch.save_file({key: value.contiguous() for key, value in tensors.items()}, partial)
    partial.replace(path)


def _restore(
    path: Path, parameters: dict[str, nn.Parameter], averaged: dict[str, Tensor], optimizer: torch.optim.AdamW
) -> int:
    tensors = safetensors.torch.load_file(path)
    step = int(tensors["step"])
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"parameter.{name}"])
            averaged[name].copy_(tensors[f"averaged.{name}"])
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": tensors[f"moment1.{name}"],
                "exp_avg_sq": tensors[f"moment2.{name}"],
            }
    return step
