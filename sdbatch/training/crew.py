"""Who trains: one process, or many workers under Ray Train, their gradients averaged by torch's DDP."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sdbatch.errors import JobFailed, SdbatchError, UsageError
from sdbatch.training.monitor import Progress

Task = Callable[[Progress], None]

_DEATHS = 3  # workers that may die; each time all go on from the last checkpoint
_SECONDS_BETWEEN_WORDS = 0.25


def check_device(workers: int, device: str) -> None:
    """Raise UsageError unless there is what every worker trains on; Ray must be running for more than one."""
    if workers == 1:
        if device == "cuda" and not torch.cuda.is_available():
            raise UsageError("device: there is no CUDA device here; train with device cpu")
        return
    import ray

    kind = "GPU" if device == "cuda" else "CPU"
    there = int(ray.cluster_resources().get(kind, 0))  # type: ignore[no-untyped-call]
    if there < workers:
        raise UsageError(f"workers: {workers} workers need as many {kind}s, and Ray has {there}; use fewer workers")


def together_with(workers: int, device: str, work: Path, task: Task, progress: Progress) -> None:
    """Run ``task`` in ``workers`` processes that torch.distributed joins; the leading one tells its progress.

    One worker is this process and needs no Ray. More are placed by Ray Train on the Ray that is running; on several
    machines ``work``, an absolute path, has to be a folder that all of them share.
    """
    try:
        if workers == 1:
            task(progress)
        else:
            _under_ray(workers, device, work, task, progress)
    except torch.OutOfMemoryError as error:
        raise JobFailed(f"not enough memory on the GPU: {error}; use a smaller --batch and more --accumulate") from None


def _under_ray(workers: int, device: str, work: Path, task: Task, progress: Progress) -> None:
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.queue import Queue

    words = Queue(actor_options={"num_cpus": 0})

    def loop() -> None:
        if device == "cpu":
            torch.set_num_threads(1)  # threads that spin starve each other
        _check_shared(work)
        told = 0.0

        def tell(*word: Any) -> None:
            nonlocal told
            if time.monotonic() - told > _SECONDS_BETWEEN_WORDS or word[1] == word[2]:
                told = time.monotonic()
                words.put(word)

        task(tell)

    # On one machine the loopback can be reached whatever the machine's own name resolves to.
    single = len(ray.nodes()) == 1  # type: ignore[no-untyped-call]
    environment = {"env_vars": {"GLOO_SOCKET_IFNAME": "lo"}} if single else None
    failed: list[Exception] = []

    def fit() -> None:
        for _ in range(_DEATHS + 1):
            trainer = TorchTrainer(
                loop,
                torch_config=TorchConfig(backend="nccl" if device == "cuda" else "gloo"),
                scaling_config=ScalingConfig(num_workers=workers, use_gpu=device == "cuda"),
                run_config=RunConfig(
                    name="ray",
                    storage_path=str(work),
                    worker_runtime_env=environment,  # type: ignore[call-arg]
                ),
            )
            failed.clear()
            try:
                trainer.fit()
                return
            except Exception as error:
                failed.append(error)
                if _cause(error) is not None:  # the same would come of it again
                    return

    # Signals reach the main thread, which is ours: in it Ray Train would take them for itself.
    fitting = threading.Thread(target=fit, daemon=True)
    fitting.start()
    while fitting.is_alive() or not words.empty():
        for word in words.get_nowait_batch(words.qsize()):
            progress(*word)
        time.sleep(_SECONDS_BETWEEN_WORDS)
    words.shutdown()
    if failed:
        raise _cause(failed[0]) or JobFailed(f"the training ended: {failed[0]}") from failed[0]


def _cause(error: Exception) -> Exception | None:
    """What a worker said itself, if that is why the training ended."""
    causes = getattr(error, "worker_failures", {}).values()
    return next((cause for cause in causes if isinstance(cause, SdbatchError | torch.OutOfMemoryError)), None)


def _check_shared(work: Path) -> None:
    """Raise UsageError where ``work`` is another folder to some workers than to the first."""
    token = [uuid.uuid4().hex]
    dist.broadcast_object_list(token)
    mark = work / f".{token[0]}"
    if dist.get_rank() == 0:
        mark.touch()
    dist.barrier()
    seen = mark.exists()
    dist.barrier()
    if dist.get_rank() == 0:
        mark.unlink()
    if not seen:
        raise UsageError(f"{work} is not one folder to all workers; train into a folder that all machines share")
