"""Examples drawn by code: scenes of the world, their latents, and captions said anew at each visit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sdbatch.diffusion.pipeline import LatentDiffusion
from sdbatch.diffusion.vae import VAE
from sdbatch.training.autoencoder import as_tensor
from sdbatch.training.captions import caption
from sdbatch.training.loop import draws, in_shares
from sdbatch.training.objective import Batch, Denoising
from sdbatch.training.world import COLOURS, PLACES, SHAPES, Scene, Thing, draw, random_scene

_BLOCK = 64  # pictures encoded at once


@dataclass(frozen=True)
class DrawnExamples:
    """Scenes, their latents (N, C, h, w) and how much of each latent position a thing covers (N, 1, h, w)."""

    scenes: list[Scene]
    latents: Tensor
    covers: Tensor
    caption_dropout: float
    thing_weight: float  # loss weight where a thing is, against 1 on the background

    def batch(self, rng: np.random.Generator, count: int) -> Batch:
        chosen = rng.integers(len(self.scenes), size=count)
        texts = ["" if rng.random() < self.caption_dropout else caption(self.scenes[i], rng) for i in chosen]
        # Things and one position around them: a circle is known by the corners that a square would fill.
        near = F.max_pool2d(self.covers[chosen], 3, stride=1, padding=1)
        return Batch(self.latents[chosen], texts, 1 + (self.thing_weight - 1) * near)


def training_scenes(seed: int, count: int) -> list[Scene]:
    rng = draws(seed, "scenes")
    return [random_scene(rng) for _ in range(count)]


@torch.no_grad()
def encode_scenes(
    vae: VAE, scenes: list[Scene], folder: Path, report: Callable[[int, int], None]
) -> tuple[Tensor, Tensor]:
    """The VAE's mean latents of drawn scenes and the scenes' covers at latent resolution, on the VAE's device."""
    device = vae.post_quant_conv.weight.device

    def encode(share: slice) -> dict[str, Tensor]:
        own, latents, covers = scenes[share], [], []
        for start in range(0, len(own), _BLOCK):
            drawn = [draw(scene) for scene in own[start : start + _BLOCK]]
            images = as_tensor(np.stack([picture for picture, _ in drawn]))
            latents.append(vae.encode(images.to(device))[0].contiguous())
            cover = torch.from_numpy(np.stack([cover for _, cover in drawn]))[:, None]
            covers.append(F.avg_pool2d(cover, vae.config.downscale))
            report(min(start + _BLOCK, len(own)), len(own))
        return {"latents": torch.cat(latents), "covers": torch.cat(covers)}

    found = in_shares(folder, len(scenes), encode)
    return found["latents"].to(device), found["covers"].to(device)


@torch.no_grad()
def word_swap(model: LatentDiffusion, examples: DrawnExamples) -> dict[str, float]:
    """How much the loss at pure noise grows, in per cent, when one word of the caption is made wrong.

    Zero means that the network does not listen to that word (yet).
    """
    rng, denoising, schedule = np.random.default_rng(0), Denoising(model), model.schedule
    chosen = [i for i, scene in enumerate(examples.scenes[:2000]) if scene.place is not None][:96]
    z0, cover = examples.latents[chosen], examples.covers[chosen]
    noise = torch.from_numpy(rng.standard_normal(z0.shape, dtype=np.float32)).to(z0.device)
    timesteps = torch.full((len(chosen),), schedule.num_train_timesteps - 1, device=z0.device)
    noisy, target = schedule.add_noise(z0, noise, timesteps), schedule.target(z0, noise, timesteps)

    def loss(scenes: list[Scene]) -> float:
        # The words are chosen alike for every scene, so that captions differ where scenes do.
        texts = [caption(scene, draws(0, i), complete=True) for i, scene in enumerate(scenes)]
        output = denoising(noisy, timesteps, texts).float()
        return float((((output - target) ** 2) * (1 + 2 * cover)).mean())

    told = [examples.scenes[i] for i in chosen]
    firsts = [(scene, scene.things[0]) for scene in told]
    right = loss(told)
    wrong = {
        "colour": [_with(scene, replace(thing, colour=_next(COLOURS, thing.colour))) for scene, thing in firsts],
        "shape": [_with(scene, replace(thing, shape=_next(SHAPES, thing.shape))) for scene, thing in firsts],
        "place": [replace(scene, place=_next(PLACES, scene.place or "")) for scene in told],
    }
    return {word: 100 * (loss(scenes) / right - 1) for word, scenes in wrong.items()}


def _with(scene: Scene, thing: Thing) -> Scene:
    return replace(scene, things=(thing, *scene.things[1:]))


def _next(names: Iterable[str], name: str) -> str:
    known = list(names)
    return known[(known.index(name) + 1) % len(known)]
