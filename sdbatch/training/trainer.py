"""The whole training of a built-in model, from nothing to a folder that loads.

WORK/tokenizer/            the learnt vocabulary
WORK/state/*.safetensors   where each stage stands; the same command goes on from there
MODEL/                     the finished model in the diffusers layout, float16
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
import torch.multiprocessing

from sdbatch.diffusion.checkpoint import Checkpoint, unstored
from sdbatch.diffusion.pipeline import LatentDiffusion
from sdbatch.training.architecture import MAX_TOKENS, SCHEDULE
from sdbatch.training.autoencoder import normalise_latents, train_vae
from sdbatch.training.captions import vocabulary
from sdbatch.training.denoiser import TrainingSet, encode_scenes, train_denoiser, training_scenes, word_swap
from sdbatch.training.loop import Report, rank, worker
from sdbatch.training.recipe import Recipe
from sdbatch.training.tokens import learn_tokenizer

# stage, done, total, text beside the bar
Progress = Callable[[str, int, int, str], None]


def run(recipe: Recipe, work: Path, model: Path, progress: Progress) -> None:
    """Train after ``recipe``, resuming whatever ``work`` holds, and write the model to ``model``."""
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as meeting:
        rendezvous = Path(meeting) / "rendezvous"
        if recipe.workers == 1:
            _work(0, recipe, work, model, rendezvous, progress)
        else:
            context = torch.multiprocessing.start_processes(  # type: ignore[attr-defined, no-untyped-call]
                _work_quietly,
                args=(recipe, work, model, rendezvous),
                nprocs=recipe.workers - 1,
                join=False,
                start_method="spawn",
            )
            _work(0, recipe, work, model, rendezvous, progress)
            context.join()


def _work_quietly(number: int, recipe: Recipe, work: Path, model: Path, rendezvous: Path) -> None:
    _work(number + 1, recipe, work, model, rendezvous, lambda stage, done, total, text: None)


def _work(number: int, recipe: Recipe, work: Path, model: Path, rendezvous: Path, progress: Progress) -> None:
    with worker(number, recipe.workers, rendezvous):
        _train(recipe, work, model, progress)


def _train(recipe: Recipe, work: Path, model: Path, progress: Progress) -> None:
    def reporter(stage: str, total: int) -> Report:
        def report(done: int, loss: float, seconds: float) -> None:
            progress(stage, done, total, f"loss {loss:.4f} · {seconds:.2f} s/step" if seconds else "")

        return report

    leader, state = rank() == 0, work / "state"
    tokenizer = learn_tokenizer(vocabulary(), MAX_TOKENS)
    vae = train_vae(recipe, state, reporter("vae", recipe.vae_steps))
    scenes = training_scenes(recipe)
    cache = state / "latents.safetensors"
    if leader and not cache.exists():
        latents, covers = encode_scenes(vae, scenes, reporter("latents", len(scenes)))
        cache.parent.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file({"latents": latents, "covers": covers}, cache.with_suffix(".partial"))
        cache.with_suffix(".partial").replace(cache)
    _together()
    cached = safetensors.torch.load_file(cache)
    latents = cached["latents"]
    normalise_latents(vae, latents)
    latents = (latents - latents.mean(dim=(0, 2, 3), keepdim=True)) / latents.std(dim=(0, 2, 3), keepdim=True)
    data = TrainingSet(scenes, latents, cached["covers"])

    text_encoder, unet = train_denoiser(recipe, tokenizer, data, state, reporter("denoiser", recipe.steps))
    if leader:
        swaps = word_swap(text_encoder, unet, tokenizer, data, SCHEDULE)
        told = ", ".join(f"{word} +{growth:.0f} %" for word, growth in swaps.items())
        progress("denoiser", recipe.steps, recipe.steps, f"word swaps raise the loss at t = 999: {told}")
        checkpoint = Checkpoint(
            path=model,
            layout="trained here",
            unet=unstored("unet", unet),
            vae=unstored("vae", vae),
            text_encoders=(unstored("text_encoder", text_encoder),),
            tokenizers=(tokenizer,),
            schedule=SCHEDULE,
        )
        LatentDiffusion(checkpoint, [text_encoder], unet, vae).save_pretrained(model, dtype="float16")


def _together() -> None:
    if dist.is_initialized():
        dist.barrier()
