"""What a training run is made of. The defaults are the recipe of ``builtin:shapes``."""

from __future__ import annotations

import math
from dataclasses import dataclass


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
    weight_decay: float = 1e-2
    accumulate: int = 1  # batches whose gradients are averaged into one step

    def rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to zero."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Recipe:
    """A run of the trainer: the VAE, the CLIP, then text encoder and U-Net together."""

    seed: int = 0
    workers: int = 2  # gradients are averaged over them; on the CPU each has one thread
    device: str = "cpu"  # or "cuda": one a worker
    mixed_precision: bool = True  # bfloat16 where autocast sees fit
    checkpoint_every: int = 100
    ema_decay: float = 0.999
    warmup: int = 150

    vae_steps: int = 1_300
    vae_batch: int = 16  # a worker
    vae_learning_rate: float = 2e-3

    clip_steps: int = 2_500
    clip_batch: int = 64  # a worker
    clip_learning_rate: float = 1e-3

    pictures: int = 60_000  # in the denoiser's training set; captions are said anew at each visit
    steps: int = 7_000
    batch: int = 32  # a worker
    prediction_type: str = "v_prediction"  # what the U-Net learns to say; or "epsilon"
    learning_rate: float = 1.2e-3
    caption_dropout: float = 0.1
    thing_weight: float = 5.0  # loss weight where a thing is, against 1 on the background
    timestep_exponent: float = 0.75  # below 1 high noise, where the layout is decided, comes up more often
    min_snr_gamma: float | None = None
    accumulate: int = 1  # batches a step
    sample_steps: int = 20  # of the sampler, for the pictures that are drawn along the way

    @property
    def vae_plan(self) -> Plan:
        return Plan("vae", self.vae_steps, self.vae_learning_rate, 50, self.seed, self.checkpoint_every, ema_decay=0.99)

    @property
    def clip_plan(self) -> Plan:
        return self._plan("scorer", self.clip_steps, self.clip_learning_rate)

    @property
    def plan(self) -> Plan:
        return self._plan("denoiser", self.steps, self.learning_rate, self.accumulate)

    def _plan(self, stage: str, steps: int, rate: float, accumulate: int = 1) -> Plan:
        return Plan(
            stage, steps, rate, self.warmup, self.seed, self.checkpoint_every, self.ema_decay, accumulate=accumulate
        )


@dataclass(frozen=True)
class FineTuning:
    """A run of the fine-tuner on somebody's captioned pictures."""

    rank: int = 16  # of the LoRA
    full: bool = False  # train all weights instead
    text_encoder: bool = False  # train the text encoders, too
    steps: int = 1_000
    batch: int = 4  # a worker
    accumulate: int = 1  # batches a step
    learning_rate: float | None = None  # None: 1e-4 for a LoRA, 1e-5 for all weights
    warmup: int = 50  # a tenth of the steps at most
    caption_dropout: float = 0.1
    min_snr_gamma: float | None = 5.0
    resolution: int | None = None  # pixels, each way; None: the model's own
    tokenizer: str | None = None  # for single files, which bring none
    prediction_type: str | None = None  # where the checkpoint can't tell
    sample_prompts: tuple[str, ...] = ()  # drawn now and then; none: the first captions
    sample_steps: int = 20  # of the sampler, for these
    seed: int = 0
    workers: int = 1
    device: str = "cpu"  # or "cuda": one a worker
    mixed_precision: bool = True  # bfloat16 where autocast sees fit
    checkpoint_every: int = 100

    @property
    def plan(self) -> Plan:
        usual = 1e-5 if self.full else 1e-4
        rate = usual if self.learning_rate is None else self.learning_rate
        warmup = min(self.warmup, self.steps // 10)
        return Plan("denoiser", self.steps, rate, warmup, self.seed, self.checkpoint_every, accumulate=self.accumulate)
