"""The denoiser's training, from nothing or from any checkpoint: what trains is what of the model needs gradients.

The objective is E‖target - network(z_t, t, text)‖², where the target is ε or v, with captions dropped now
and then so that the network also learns to go without (Ho & Salimans 2022).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from sdbatch.diffusion.pipeline import LatentDiffusion
from sdbatch.training.loop import Inspect, Report, autocast, parallel, train
from sdbatch.training.objective import Denoising, Examples, Objective
from sdbatch.training.recipe import Plan


def train_denoiser(
    model: LatentDiffusion,
    examples: Examples,
    objective: Objective,
    plan: Plan,
    folder: Path,
    report: Report,
    inspect: Inspect | None = None,
    *,
    batch: int,
    mixed_precision: bool,
    size: tuple[int, int] | None = None,
) -> None:
    """Train ``model`` in place on batches of ``batch`` pictures of ``size`` pixels (its own size when left out)."""
    network = parallel(Denoising(model, size))
    device = model.device.type

    def loss(rng: np.random.Generator) -> Tensor:
        with autocast(device, mixed_precision):
            return objective.loss(network, model.schedule, examples.batch(rng, batch), rng)

    train(network, loss, plan, folder, report, inspect)
