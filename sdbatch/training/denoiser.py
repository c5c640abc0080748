"""Stage two: text encoder and U-Net learn together to denoise latents (Ho et al. 2020, eq. 14).

The objective is E‖target - network(z_t, t, text)‖², where the target is ε or v, with captions dropped now
and then so that the network also learns to go without (Ho & Salimans 2022).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdbatch.diffusion.schedule import NoiseSchedule
from sdbatch.diffusion.text_encoder import TextEncoder
from sdbatch.diffusion.tokenizer import CLIPTokenizer
from sdbatch.diffusion.unet import UNet
from sdbatch.diffusion.vae import VAE
from sdbatch.training.architecture import SCHEDULE, UNET_CONFIG, text_config
from sdbatch.training.autoencoder import as_tensor
from sdbatch.training.captions import caption
from sdbatch.training.loop import Plan, Report, draws, parallel, train
from sdbatch.training.recipe import Recipe
from sdbatch.training.world import COLOURS, SHAPES, Scene, draw, random_scene


@dataclass(frozen=True)
class TrainingSet:
    """Scenes, their latents (N, C, h, w) and how much of each latent position a thing covers (N, 1, h, w)."""

    scenes: list[Scene]
    latents: Tensor
    covers: Tensor


def training_scenes(recipe: Recipe) -> list[Scene]:
    rng = draws(recipe.seed, "scenes")
    return [random_scene(rng) for _ in range(recipe.pictures)]


@torch.no_grad()
def encode_scenes(vae: VAE, scenes: list[Scene], report: Report) -> tuple[Tensor, Tensor]:
    """The VAE's mean latents of drawn scenes, and the scenes' covers at latent resolution."""
    latents, covers, block = [], [], 64
    for start in range(0, len(scenes), block):
        drawn = [draw(scene) for scene in scenes[start : start + block]]
        latents.append(vae.encode(as_tensor(np.stack([picture for picture, _ in drawn])))[0].contiguous())
        cover = torch.from_numpy(np.stack([cover for _, cover in drawn]))[:, None]
        covers.append(F.avg_pool2d(cover, vae.config.downscale))
        report(min(start + block, len(scenes)), 0.0, 0.0)
    return torch.cat(latents).contiguous(), torch.cat(covers).contiguous()


class Denoising(nn.Module):
    """Noisy latents, time steps and token ids → the network's output."""

    def __init__(self, text_encoder: TextEncoder, unet: UNet) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet

    def forward(self, z: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        return self.unet(z, timesteps, self.text_encoder.normalise(self.text_encoder(ids)[-1]))


def train_denoiser(
    recipe: Recipe, tokenizer: CLIPTokenizer, data: TrainingSet, folder: Path, report: Report
) -> tuple[TextEncoder, UNet]:
    """Train text encoder and U-Net on ``data``; returns the averaged weights."""
    torch.manual_seed(recipe.seed + 1)
    denoising = Denoising(TextEncoder(text_config(len(tokenizer.vocab))), UNet(UNET_CONFIG))
    _start_gently(denoising)
    network, schedule = parallel(denoising), SCHEDULE

    def loss(rng: np.random.Generator) -> Tensor:
        chosen = rng.integers(len(data.scenes), size=recipe.batch)
        texts = ["" if rng.random() < recipe.caption_dropout else caption(data.scenes[i], rng) for i in chosen]
        ids = torch.tensor(tokenizer(texts))
        z0 = data.latents[chosen]
        # Things and one position around them: a circle is known by the corners that a square would fill.
        near = F.max_pool2d(data.covers[chosen], 3, stride=1, padding=1)
        noise = torch.from_numpy(rng.standard_normal(z0.shape, dtype=np.float32))
        timesteps = _stratified_timesteps(rng, recipe.batch, schedule)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.mixed_precision):
            output = network(schedule.add_noise(z0, noise, timesteps), timesteps, ids)
        error = (output.float() - schedule.target(z0, noise, timesteps)) ** 2
        return (error * (1 + (recipe.thing_weight - 1) * near)).mean()

    plan = Plan(
        stage="denoiser",
        steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        warmup=recipe.warmup,
        seed=recipe.seed,
        checkpoint_every=recipe.checkpoint_every,
        ema_decay=recipe.ema_decay,
    )
    denoising.load_state_dict(train(denoising, loss, plan, folder, report))
    denoising.eval().requires_grad_(False)
    return denoising.text_encoder, denoising.unet


def _start_gently(denoising: Denoising) -> None:
    """Start as the identity: what is added to a residual stream begins at zero; embeddings begin small."""
    for name, parameter in denoising.unet.named_parameters():
        if name.endswith(("conv2.weight", "conv2.bias", "conv_out.weight", "conv_out.bias")) or ".proj_out." in name:
            nn.init.zeros_(parameter)
    embeddings = denoising.text_encoder.text_model.embeddings
    nn.init.normal_(embeddings.token_embedding.weight, std=0.1)
    nn.init.normal_(embeddings.position_embedding.weight, std=0.02)


def _stratified_timesteps(rng: np.random.Generator, count: int, schedule: NoiseSchedule) -> Tensor:
    """One time step from each of ``count`` strata, denser at high noise, where the layout is decided."""
    spread = (np.arange(count) + rng.random(count)) / count
    steps = np.floor(schedule.num_train_timesteps * spread**0.75)
    return torch.from_numpy(np.clip(steps, 0, schedule.num_train_timesteps - 1).astype(np.int64))


@torch.no_grad()
def word_swap(
    text_encoder: TextEncoder, unet: UNet, tokenizer: CLIPTokenizer, data: TrainingSet, schedule: NoiseSchedule
) -> dict[str, float]:
    """How much the loss at pure noise grows, in per cent, when one word of the caption is made wrong.

    Zero means that the network does not listen to that word (yet).
    """
    rng, denoising = np.random.default_rng(0), Denoising(text_encoder, unet)
    chosen = [i for i, scene in enumerate(data.scenes[:2000]) if scene.place is not None][:96]
    z0, cover = data.latents[chosen], data.covers[chosen]
    noise = torch.from_numpy(rng.standard_normal(z0.shape, dtype=np.float32))
    timesteps = torch.full((len(chosen),), schedule.num_train_timesteps - 1)
    noisy, target = schedule.add_noise(z0, noise, timesteps), schedule.target(z0, noise, timesteps)

    def loss(swap: dict[str, str]) -> float:
        texts = []
        for i in chosen:
            thing = data.scenes[i].things[0]
            words = {"colour": thing.colour, "shape": thing.shape, "place": data.scenes[i].place or ""}
            words |= {key: _other(words[key], names) for key, names in swap_names.items() if key in swap}
            ground = data.scenes[i].background
            texts.append(f"a {words['colour']} {words['shape']} in the {words['place']} on a {ground} background")
        output = denoising(noisy, timesteps, torch.tensor(tokenizer(texts)))
        return float((((output - target) ** 2) * (1 + 2 * cover)).mean())

    swap_names = {"colour": list(COLOURS), "shape": list(SHAPES), "place": ["top left", "bottom right"]}
    right = loss({})
    return {key: 100 * (loss({key: key}) / right - 1) for key in swap_names}


def _other(word: str, names: list[str]) -> str:
    return names[(names.index(word) + 1) % len(names)] if word in names else names[0]
