"""Who trains: one process, or many workers under Ray Train, their gradients averaged by torch's DDP."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sdbatch.errors import JobFailed, SdbatchError, UsageError
from sdbatch.training.monitor import Progress

Task = Callable[[Progress], None]

_DEATHS = 3  # workers that may die; each time all go on from the last checkpoint
_SECONDS_BETWEEN_WORDS = 0.25


def together_with(workers: int, device: str, work: Path, task: Task, progress: Progress) -> None:
    """Run ``task`` in ``workers`` processes that torch.distributed joins; the leading one tells its progress.

    One worker is this process and needs no Ray. More are placed by Ray Train on the Ray that is running; on several
    machines ``work`` has to be a folder that all of them share. Raises UsageError without a GPU for every worker.
    """
    if device == "cuda" and workers == 1 and not torch.cuda.is_available():
        raise UsageError("device: there is no CUDA device here; train with device cpu")
    work.mkdir(parents=True, exist_ok=True)
    if workers == 1:
        if device == "cpu":
            torch.set_num_threads(1)
        task(progress)
    else:
        _under_ray(workers, device, work.absolute(), task, progress)


def _under_ray(workers: int, device: str, work: Path, task: Task, progress: Progress) -> None:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.queue import Queue

    words = Queue(actor_options={"num_cpus": 0})

    def loop() -> None:
        if device == "cpu":
            torch.set_num_threads(1)  # threads that spin starve each other
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
    trainer = TorchTrainer(
        loop,
        torch_config=TorchConfig(backend="nccl" if device == "cuda" else "gloo"),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=device == "cuda"),
        run_config=RunConfig(
            name="ray",
            storage_path=str(work),
            failure_config=FailureConfig(max_failures=_DEATHS),
            worker_runtime_env=environment,  # type: ignore[call-arg]
        ),
    )
    done = threading.Event()

    def listen() -> None:
        while not done.is_set() or not words.empty():
            for word in words.get_nowait_batch(words.qsize()):
                progress(*word)
            time.sleep(_SECONDS_BETWEEN_WORDS)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        trainer.fit()
    except Exception as error:
        causes = [cause for cause in getattr(error, "worker_failures", {}).values() if isinstance(cause, SdbatchError)]
        raise causes[0] if causes else JobFailed(f"the training ended: {error}") from error
    finally:
        done.set()
        listener.join()
        words.shutdown()
