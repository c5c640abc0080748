"""The whole training of a built-in model, from nothing to folders that load.

WORK/state/*.safetensors   where each stage stands; the same command goes on from there
WORK/tensorboard/          curves
WORK/samples/              what the denoiser drew along the way
WORK/model/                the finished model in the diffusers layout, float16
WORK/scorer/               its CLIP, in transformers' layout, float16
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdbatch.diffusion.checkpoint import Checkpoint, unstored
from sdbatch.diffusion.pipeline import LatentDiffusion
from sdbatch.diffusion.text_encoder import TextEncoder
from sdbatch.diffusion.unet import UNet
from sdbatch.diffusion.vae import VAE
from sdbatch.training.architecture import (
    MAX_TOKENS,
    UNET_CONFIG,
    VAE_CONFIG,
    noise_schedule,
    start_gently,
    text_config,
)
from sdbatch.training.autoencoder import normalise_latents, train_vae
from sdbatch.training.captions import caption, vocabulary
from sdbatch.training.crew import check_device, together_with
from sdbatch.training.denoiser import train_denoiser
from sdbatch.training.drawn import DrawnExamples, encode_scenes, training_scenes, word_swap
from sdbatch.training.identity import claim
from sdbatch.training.loop import draws, rank
from sdbatch.training.monitor import Monitor, Progress
from sdbatch.training.objective import Objective
from sdbatch.training.recipe import Recipe
from sdbatch.training.scorer import new_clip, train_clip
from sdbatch.training.tokens import learn_tokenizer
from sdbatch.training.world import random_scene

_SAMPLES = 32  # on a sheet
_LOOK_EVERY = 5  # checkpoints


def run(recipe: Recipe, work: Path, progress: Progress) -> None:
    """Train after ``recipe``, resuming whatever ``work`` holds; the model comes into ``work/model``.

    Raises UsageError where ``work`` holds the training of another recipe.
    """
    work = work.absolute()  # workers have folders of their own
    check_device(recipe.workers, recipe.device)
    claim(work / "state", asdict(recipe))
    together_with(recipe.workers, recipe.device, work, lambda told: _train(recipe, work, told), progress)


def _train(recipe: Recipe, work: Path, progress: Progress) -> None:
    # On the CPU, for so few tokens, a third faster than the fused kernel.
    with sdpa_kernel(SDPBackend.MATH) if recipe.device == "cpu" else nullcontext():
        _all_stages(recipe, work, progress)


def _all_stages(recipe: Recipe, work: Path, progress: Progress) -> None:
    state, monitor = work / "state", Monitor(work, progress)
    tokenizer = learn_tokenizer(vocabulary(), MAX_TOKENS)

    torch.manual_seed(recipe.seed)
    vae = VAE(VAE_CONFIG).to(recipe.device)
    train_vae(vae, recipe, state, monitor.step)
    vae.eval().requires_grad_(False)

    torch.manual_seed(recipe.seed + 2)
    clip = new_clip(tokenizer).to(recipe.device)
    train_clip(clip, recipe, recipe.clip_plan, state, monitor.step)
    clip.eval().requires_grad_(False)

    scenes = training_scenes(recipe.seed, recipe.pictures)
    latents, covers = encode_scenes(vae, scenes, state, lambda done, total: monitor.told("latents", done, total))
    examples = DrawnExamples(
        scenes, normalise_latents(vae, latents), covers, recipe.caption_dropout, recipe.thing_weight
    )
    torch.manual_seed(recipe.seed + 1)
    text_encoder, unet = TextEncoder(text_config(len(tokenizer.vocab))), UNet(UNET_CONFIG)
    text_encoder.text_model.load_state_dict(clip.text_model.state_dict())
    start_gently(unet)
    checkpoint = Checkpoint(
        path=work / "model",
        layout="trained here",
        unet=unstored("unet", unet),
        vae=unstored("vae", vae),
        text_encoders=(unstored("text_encoder", text_encoder),),
        tokenizers=(tokenizer,),
        schedule=noise_schedule(recipe.prediction_type),
    )
    model = LatentDiffusion(checkpoint, [text_encoder.to(recipe.device)], unet.to(recipe.device), vae)
    chance = draws(recipe.seed, "samples")
    prompts = [caption(random_scene(chance), chance, complete=True) for _ in range(_SAMPLES)]

    def look(step: int) -> None:
        if step % (_LOOK_EVERY * recipe.checkpoint_every) == 0 or step == recipe.steps:
            swaps = word_swap(model, examples)
            monitor.numbers("word swap", swaps, step)
            monitor.samples(model, prompts, step, steps=recipe.sample_steps, batch=_SAMPLES)
            told = ", ".join(f"{word} +{growth:.0f} %" for word, growth in swaps.items())
            monitor.told("denoiser", step, recipe.steps, f"swapped words raise the loss at t = 999: {told}")

    train_denoiser(
        model,
        examples,
        Objective(timestep_exponent=recipe.timestep_exponent, min_snr_gamma=recipe.min_snr_gamma),
        recipe.plan,
        state,
        monitor.step,
        look,
        batch=recipe.batch,
        mixed_precision=recipe.mixed_precision,
    )
    if rank() == 0:
        clip.save_pretrained(work / "scorer", dtype="float16")
        model.save_pretrained(work / "model", dtype="float16")
    monitor.close()
