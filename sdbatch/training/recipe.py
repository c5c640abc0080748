"""What a training run is made of. The defaults are the recipe of ``builtin:shapes``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """A run of the trainer: first the VAE, then text encoder and U-Net together."""

    seed: int = 0
    workers: int = 2  # processes of one thread each; gradients are averaged
    pictures: int = 40_000  # in the training set; captions are drawn anew at each visit
    vae_steps: int = 1_300
    vae_batch: int = 16  # a worker
    vae_learning_rate: float = 2e-3
    steps: int = 6_200
    batch: int = 32  # a worker
    learning_rate: float = 1.2e-3
    warmup: int = 150
    caption_dropout: float = 0.1
    thing_weight: float = 3.0  # loss weight where a thing is, against 1 on the background
    ema_decay: float = 0.999
    checkpoint_every: int = 100
    mixed_precision: bool = True  # bfloat16 where autocast sees fit
