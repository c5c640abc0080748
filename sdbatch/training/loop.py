"""The training loop that all stages share: data-parallel workers, gradient accumulation, EMA, exact resuming.

Everything random in step n comes from (seed, stage, n, rank), so a resumed run sees what the uninterrupted
one saw. State is kept as safetensors, like every other weight of this project.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sdbatch.errors import JobFailed, ModelError
from sdbatch.training.recipe import Plan

Loss = Callable[[np.random.Generator], Tensor]


@dataclass(frozen=True)
class Step:
    """What is known after a step."""

    stage: str
    done: int
    total: int
    loss: float  # a running mean over about 50 steps
    gradient_norm: float  # before clipping to 1
    learning_rate: float
    seconds: float  # a step, on average since the start or the resuming


Report = Callable[[Step], None]
#: Looks at the model now and then, with the averaged weights in place.
Inspect = Callable[[int], None]


def draws(seed: int, *path: int | str) -> np.random.Generator:
    """A generator of its own for every place in the run that needs chance."""
    words = [part if isinstance(part, int) else int.from_bytes(part.encode(), "little") % 2**32 for part in path]
    return np.random.default_rng([seed, *words])


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def workers() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def in_shares(folder: Path, count: int, make: Callable[[slice], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What ``make`` gives for ``count`` things, each worker making a share and keeping it in ``folder`` for all.

    No share is empty while there are as many things as workers. The tensors are on the CPU, joined along their first
    dimension.
    """
    files = [folder / f"latents-{number + 1}-of-{workers()}.safetensors" for number in range(workers())]
    if not files[rank()].exists():
        store(files[rank()], make(slice(count * rank() // workers(), count * (rank() + 1) // workers())))
    if dist.is_initialized():
        dist.barrier()
    parts = [stored(path) for path in files]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def parallel(module: nn.Module) -> nn.Module:
    """The module with its gradients averaged over the workers."""
    # 1×1 kernels come in two equally good memory layouts; copying between them costs nothing here.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    return DistributedDataParallel(module) if dist.is_initialized() else module


def autocast(device: str, enabled: bool) -> torch.autocast:
    """bfloat16 where torch sees fit; it needs no scaling of the loss."""
    return torch.autocast(device, torch.bfloat16, enabled=enabled)


def train(
    module: nn.Module, loss: Loss, plan: Plan, folder: Path, report: Report, inspect: Inspect | None = None
) -> None:
    """Minimise ``loss``, which calls ``module``; leaves the trained (or averaged) weights in it.

    Weights that need no gradient stay as they are. Goes on from ``folder/{stage}.safetensors`` when it is there;
    raises ModelError when that is the state of another training.
    """
    inner = module.module if isinstance(module, DistributedDataParallel) else module
    parameters = {name: value for name, value in inner.named_parameters() if value.requires_grad}
    weights = list(parameters.values())
    optimizer = torch.optim.AdamW(
        weights, lr=plan.learning_rate, betas=plan.betas, weight_decay=plan.weight_decay, fused=True
    )
    averaged = None
    if plan.ema_decay is not None:
        averaged = {name: value.detach().clone() for name, value in parameters.items()}
    state_file = folder / f"{plan.stage}.safetensors"
    start = _restore(state_file, parameters, averaged, optimizer) if state_file.exists() else 0
    running, since = 0.0, time.perf_counter()
    for step in range(start, plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(step)
        optimizer.zero_grad(set_to_none=True)
        value = _gradients(module, loss, plan, step)
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        if not torch.isfinite(norm):
            raise JobFailed(
                f"{plan.stage}: the gradient of step {step + 1} is not finite; learn more slowly, in another folder"
            )
        optimizer.step()
        if averaged is not None and plan.ema_decay is not None:
            decay = min(plan.ema_decay, (step + 1) / (step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(list(averaged.values()), weights, 1 - decay)
        running = value if step == start else 0.98 * running + 0.02 * value
        done = step + 1
        if rank() == 0 and (done % plan.checkpoint_every == 0 or done == plan.steps):
            _save(state_file, done, parameters, averaged, optimizer)
            if inspect is not None:
                with _in_place(parameters, averaged or {}):
                    inspect(done)
        seconds = (time.perf_counter() - since) / (done - start)
        report(Step(plan.stage, done, plan.steps, running, float(norm), plan.rate(step), seconds))
    with torch.no_grad():
        for name, average in (averaged or {}).items():
            parameters[name].copy_(average)


def _gradients(module: nn.Module, loss: Loss, plan: Plan, step: int) -> float:
    """Add up the gradients of the step's batches; returns their mean loss."""
    mean = 0.0
    for part in range(plan.accumulate):
        last = part == plan.accumulate - 1
        waiting: AbstractContextManager[None] = nullcontext()
        if isinstance(module, DistributedDataParallel) and not last:
            waiting = module.no_sync()
        with waiting:
            value = loss(draws(plan.seed, plan.stage, step, rank(), *([part] if part else []))) / plan.accumulate
            value.backward()  # type: ignore[no-untyped-call]
        mean += value.item()
    return mean


@contextmanager
def _in_place(parameters: Mapping[str, nn.Parameter], averaged: Mapping[str, Tensor]) -> Iterator[None]:
    """The averaged weights in place of the trained ones; nothing is copied."""
    trained = {name: parameters[name].data for name in averaged}
    for name, value in averaged.items():
        parameters[name].data = value
    try:
        yield
    finally:
        for name, value in trained.items():
            parameters[name].data = value


def _save(
    path: Path,
    step: int,
    parameters: Mapping[str, nn.Parameter],
    averaged: Mapping[str, Tensor] | None,
    optimizer: torch.optim.AdamW,
) -> None:
    tensors = {"step": torch.tensor(step)}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        tensors[f"parameter.{name}"] = parameter.detach()
        tensors[f"moment1.{name}"] = state["exp_avg"]
        tensors[f"moment2.{name}"] = state["exp_avg_sq"]
    tensors |= {f"averaged.{name}": value for name, value in (averaged or {}).items()}
    store(path, tensors)


def store(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file of the training's state; a run that is killed meanwhile leaves the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    safetensors.torch.save_file({key: value.contiguous() for key, value in tensors.items()}, partial)
    partial.replace(path)


def stored(path: Path) -> dict[str, Tensor]:
    """What such a file holds. Raises ModelError where it is damaged."""
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ModelError(f"{path} is damaged: {error}; remove it, and the same command makes it anew") from None


def _restore(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    averaged: Mapping[str, Tensor] | None,
    optimizer: torch.optim.AdamW,
) -> int:
    tensors = stored(path)
    step = int(tensors["step"])
    shapes = {key.removeprefix("parameter."): tensors[key].shape for key in tensors if key.startswith("parameter.")}
    if shapes != {name: parameter.shape for name, parameter in parameters.items()}:
        raise ModelError(f"{path} is the state of another training; train into another folder, or remove it")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"parameter.{name}"])
            if averaged is not None:
                averaged[name].copy_(tensors[f"averaged.{name}"])
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step), device=parameter.device),
                # In the parameter's own layout, which the fused optimizer insists on; files keep none.
                "exp_avg": torch.empty_like(parameter).copy_(tensors[f"moment1.{name}"]),
                "exp_avg_sq": torch.empty_like(parameter).copy_(tensors[f"moment2.{name}"]),
            }
    return step
