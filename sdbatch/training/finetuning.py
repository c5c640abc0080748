"""Fine-tuning: a model that is there learns somebody's captioned pictures, as a LoRA or with all its weights.

WORK/state/*.safetensors   the pictures' latents, and where the training stands; the same command goes on from there
WORK/lora/                 the LoRA in the layout of peft
WORK/model/                or the whole model in the diffusers layout, float16
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sdbatch.diffusion import LatentDiffusion, open_checkpoint
from sdbatch.diffusion.checkpoint import Checkpoint
from sdbatch.errors import ModelError, UsageError
from sdbatch.training.autoencoder import as_tensor
from sdbatch.training.captioned import CaptionedPicture, prepare, read_captioned
from sdbatch.training.crew import check_device, together_with
from sdbatch.training.denoiser import train_denoiser
from sdbatch.training.identity import claim
from sdbatch.training.loop import in_shares, rank
from sdbatch.training.lora import FILE_NAME as LORA
from sdbatch.training.lora import add_lora, save_lora
from sdbatch.training.monitor import Monitor, Progress
from sdbatch.training.objective import Batch, Objective
from sdbatch.training.recipe import FineTuning

_BLOCK = 4  # pictures encoded at once
_SAMPLES = 8  # on a sheet


@dataclass(frozen=True)
class CaptionedExamples:
    """Mean and spread of the pictures' latents, each (N, C, h, w) on the CPU, and a caption each."""

    mean: Tensor
    spread: Tensor
    captions: Sequence[str]
    caption_dropout: float
    device: str

    def batch(self, rng: np.random.Generator, count: int) -> Batch:
        chosen = rng.integers(len(self.captions), size=count)
        texts = ["" if rng.random() < self.caption_dropout else self.captions[i] for i in chosen]
        mean, spread = self.mean[chosen], self.spread[chosen]
        noise = torch.from_numpy(rng.standard_normal(mean.shape, dtype=np.float32))
        return Batch((mean + spread * noise).to(self.device), texts)


def run(recipe: FineTuning, model: str, pictures: Path, work: Path, progress: Progress) -> Path:
    """Fine-tune ``model`` after ``recipe``, resuming whatever ``work`` holds; returns the LoRA's file or the model.

    Raises InputError for what is wrong with the pictures and ModelError or UsageError for what can't be trained, all
    before a weight is loaded.
    """
    # Workers have folders of their own, where relative paths would lead elsewhere.
    work, pictures, model = work.absolute(), pictures.absolute(), _absolute(model)
    if recipe.tokenizer is not None:
        recipe = replace(recipe, tokenizer=_absolute(recipe.tokenizer))
    if work.is_relative_to(pictures):
        raise UsageError(f"{work} lies within the pictures, and so would its samples; name another folder")
    examples = read_captioned(pictures)
    if len(examples) < recipe.workers:
        raise UsageError(f"{pictures} holds {len(examples)} pictures for {recipe.workers} workers; use fewer workers")
    checkpoint = _open(model, recipe)
    check_device(recipe.workers, recipe.device)
    _check(checkpoint, recipe)
    settings = {name: value for name, value in asdict(recipe).items() if name != "sample_prompts"}
    claim(work / "state", {"model": checkpoint.fingerprint(), "pictures": _digest(examples), **settings})
    together_with(
        recipe.workers, recipe.device, work, lambda told: _train(recipe, model, examples, work, told), progress
    )
    return work / "model" if recipe.full else work / "lora" / LORA


def _absolute(model: str) -> str:
    return str(Path(model).absolute()) if Path(model).exists() else model


def _open(model: str, recipe: FineTuning) -> Checkpoint:
    return open_checkpoint(model, recipe.tokenizer, recipe.prediction_type)


def _digest(pictures: Sequence[CaptionedPicture]) -> str:
    """sha256 over captions and pictures."""
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(hashlib.sha256(picture.read()).digest() + hashlib.sha256(picture.caption.encode()).digest())
    return digest.hexdigest()


def _check(checkpoint: Checkpoint, recipe: FineTuning) -> None:
    if checkpoint.unet.config.in_channels != checkpoint.vae.config.latent_channels:
        raise ModelError(f"model '{checkpoint.path}' repaints pictures: only text-to-image models can be fine-tuned")
    factor = checkpoint.vae.config.downscale << (len(checkpoint.unet.config.block_out_channels) - 1)
    if recipe.resolution is not None and recipe.resolution % factor:
        raise UsageError(f"resolution is {recipe.resolution}; this model needs a multiple of {factor}")


def _train(recipe: FineTuning, uri: str, pictures: Sequence[CaptionedPicture], work: Path, progress: Progress) -> None:
    state, monitor = work / "state", Monitor(work, progress)
    model = LatentDiffusion.from_pretrained(
        uri, recipe.device, tokenizer=recipe.tokenizer, prediction_type=recipe.prediction_type
    )
    size = (recipe.resolution, recipe.resolution) if recipe.resolution else model.default_size
    mean, spread = _encode(model, pictures, size, state, monitor)
    captions = [picture.caption for picture in pictures]
    _choose(model, recipe)
    prompts = recipe.sample_prompts or tuple(captions[:_SAMPLES])

    def look(step: int) -> None:
        monitor.samples(model, prompts, step, steps=recipe.sample_steps, batch=recipe.batch, size=size)

    train_denoiser(
        model,
        CaptionedExamples(mean, spread, captions, recipe.caption_dropout, recipe.device),
        Objective(min_snr_gamma=recipe.min_snr_gamma),
        recipe.plan,
        state,
        monitor.step,
        look,
        batch=recipe.batch,
        mixed_precision=recipe.mixed_precision,
        size=size,
    )
    if rank() == 0:
        if recipe.full:
            model.save_pretrained(work / "model", dtype="float16")
        else:
            save_lora(work / "lora", model.networks())
    monitor.close()


def _choose(model: LatentDiffusion, recipe: FineTuning) -> None:
    """Leave only that with gradients which is to learn."""
    chance = torch.Generator().manual_seed(recipe.seed)
    for network in model.networks().values():
        network.requires_grad_(False)
    for network in [model.unet, *(model.text_encoders if recipe.text_encoder else [])]:
        if recipe.full:
            network.requires_grad_(True)
        else:
            add_lora(network, recipe.rank, generator=chance)
    if model.unet.config.added_dim:
        # Of SDXL's first text encoder the states before the last layer are read and nothing after them.
        for encoder in model.text_encoders[:-1]:
            encoder.text_model.encoder.layers[-1].requires_grad_(False)
            encoder.text_model.final_layer_norm.requires_grad_(False)


@torch.no_grad()
def _encode(
    model: LatentDiffusion, pictures: Sequence[CaptionedPicture], size: tuple[int, int], folder: Path, monitor: Monitor
) -> tuple[Tensor, Tensor]:
    """Mean and spread of the scaled latents of all pictures, on the CPU, where there is room for many."""
    scale = model.vae.config.scaling_factor

    def encode(share: slice) -> dict[str, Tensor]:
        own, means, spreads = pictures[share], [], []
        for start in range(0, len(own), _BLOCK):
            block = np.stack([prepare(picture, *size) for picture in own[start : start + _BLOCK]])
            mean, log_variance = model.vae.encode(as_tensor(block).to(model.device))
            means.append((scale * mean).cpu())
            spreads.append((scale * (0.5 * log_variance).exp()).cpu())
            monitor.told("latents", min(start + _BLOCK, len(own)), len(own))
        return {"mean": torch.cat(means), "spread": torch.cat(spreads)}

    found = in_shares(folder, len(pictures), encode)
    return found["mean"], found["spread"]
