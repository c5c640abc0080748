"""Stage two: a CLIP learns which caption belongs to which picture (Radford et al. 2021, figure 3).

Besides the captions of the other pictures each picture is held against captions of its own with one word wrong,
without which such a model learns bags of words (Yuksekgonul et al. 2023). And because the world is drawn, both encoders
can be asked outright what is in the picture, which teaches them several times as fast; what answers is not kept.
Its text encoder is where the text encoder of the diffusion model starts from.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdbatch.diffusion.clip import CLIP
from sdbatch.diffusion.tokenizer import CLIPTokenizer
from sdbatch.training.architecture import IMAGE_CONFIG, PREPROCESSING, PROJECTION_DIM, text_config
from sdbatch.training.autoencoder import as_tensor
from sdbatch.training.captions import caption, mistakes
from sdbatch.training.loop import Report, autocast, draws, parallel, train
from sdbatch.training.recipe import Plan, Recipe
from sdbatch.training.world import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, Scene, draw, random_scene

WRONG = 2  # captions with a mistake, for each picture
_LARGEST_SCALE = float(np.log(100))

_OF_A_THING = (COLOURS, SHAPES, SIZES)
#: What is asked of a scene, each with its possible answers.
QUESTIONS: tuple[Collection[str], ...] = (BACKGROUNDS, ("one", "two"), ("across", "down"), PLACES, *2 * _OF_A_THING)
_UNASKED = -100  # what torch's cross entropy leaves out
_ASKED = 4.0  # weight of the answers in the loss


class Matching(nn.Module):
    """Pictures (B, 3, S, S), the ids of their captions (B, L) and of wrong ones (B·K, L), and what the pictures show,
    (B, questions) → the loss."""

    def __init__(self, clip: CLIP) -> None:
        super().__init__()
        self.clip = clip
        self.answer = nn.Linear(PROJECTION_DIM, sum(len(options) for options in QUESTIONS))

    def forward(self, pixels: Tensor, right: Tensor, wrong: Tensor, truth: Tensor) -> Tensor:
        count = len(pixels)
        pictures = self.clip.image_vectors(pixels)  # (B, D)
        texts = self.clip.text_vectors(torch.cat([right, wrong]))  # (B + B·K, D)
        scale = self.clip.logit_scale.clamp(max=_LARGEST_SCALE).exp()
        cosines = scale * pictures @ texts[:count].T  # (B, B)
        own = scale * torch.einsum("bd,bkd->bk", pictures, texts[count:].reshape(count, -1, texts.shape[1]))
        true = torch.arange(count, device=pixels.device)
        of_pictures = F.cross_entropy(torch.cat([cosines, own], dim=1), true)
        matched = (of_pictures + F.cross_entropy(cosines.T, true)) / 2
        return matched + _ASKED * (self._asked(pictures, truth) + self._asked(texts[:count], truth)) / 2

    def _asked(self, vectors: Tensor, truth: Tensor) -> Tensor:
        """Mean loss of the answers that a linear layer reads from unit vectors (B, D)."""
        told = self.answer(vectors * PROJECTION_DIM**0.5).split([len(options) for options in QUESTIONS], dim=1)
        losses = [F.cross_entropy(of, truth[:, i], reduction="sum") for i, of in enumerate(told)]
        return torch.stack(losses).sum() / (truth != _UNASKED).sum()


def answers(scene: Scene) -> list[int]:
    """The answer to each of the QUESTIONS by its number, ``_UNASKED`` where it makes no sense."""
    two = scene.relation is not None
    told = [
        list(BACKGROUNDS).index(scene.background),
        int(two),
        int(scene.relation in {"above", "below"}) if two else _UNASKED,
        _UNASKED if scene.place is None else list(PLACES).index(scene.place),
    ]
    for thing in scene.ordered:
        told += [list(COLOURS).index(thing.colour), list(SHAPES).index(thing.shape), list(SIZES).index(thing.size)]
    return told + [_UNASKED] * (len(QUESTIONS) - len(told))


def new_clip(tokenizer: CLIPTokenizer) -> CLIP:
    """A CLIP of the built-in model's sizes, untrained; its weights come from torch's own generator."""
    text = text_config(len(tokenizer.vocab))
    clip = CLIP(tokenizer, text, IMAGE_CONFIG, PROJECTION_DIM, PREPROCESSING)
    embeddings = clip.text_model.embeddings
    nn.init.normal_(embeddings.token_embedding.weight, std=0.1)
    nn.init.normal_(embeddings.position_embedding.weight, std=0.02)
    nn.init.normal_(clip.vision_model.embeddings.position_embedding.weight, std=0.5)  # as large as the patches
    nn.init.normal_(clip.vision_model.embeddings.class_embedding, std=0.02)
    nn.init.constant_(clip.logit_scale, float(np.log(1 / 0.07)))
    return clip


def train_clip(clip: CLIP, recipe: Recipe, plan: Plan, folder: Path, report: Report) -> None:
    """Train ``clip`` in place on pictures that are drawn as they are needed, each seen once."""
    objective = parallel(Matching(clip))
    device = recipe.device

    def loss(rng: np.random.Generator) -> Tensor:
        scenes = [random_scene(rng) for _ in range(recipe.clip_batch)]
        pixels = as_tensor(np.stack([draw(scene)[0] for scene in scenes])).to(device)
        told = [right_and_wrong(scene, rng, WRONG, complete=bool(i % 2)) for i, scene in enumerate(scenes)]
        right, wrong = [texts[0] for texts in told], [text for texts in told for text in texts[1:]]
        ids = [torch.tensor(clip.tokenizer(texts), device=device) for texts in (right, wrong)]
        truth = torch.tensor([answers(scene) for scene in scenes], device=device)
        with autocast(device, recipe.mixed_precision):
            value: Tensor = objective(pixels, *ids, truth)
        return value

    train(objective, loss, plan, folder, report)


def ranks_first(clip: CLIP, scenes: list[Scene], rng: np.random.Generator, among: int = 16) -> list[bool]:
    """For each drawn scene: does its own caption score above ``among - 1`` captions with one attribute changed?"""
    found = []
    for scene in scenes:
        captions = right_and_wrong(scene, rng, among - 1, complete=True)
        scores = clip.embed_images(draw(scene)[0][None]) @ clip.embed_texts(captions).T  # (1, among)
        found.append(int(scores.argmax()) == 0)
    return found


def right_and_wrong(scene: Scene, rng: np.random.Generator, count: int, *, complete: bool) -> list[str]:
    """A caption, then ``count`` others that differ from it where something was mistaken, and nowhere else."""
    words, false = int(rng.integers(2**32)), mistakes(scene)
    told = [caption(scene, draws(words), complete=complete)]
    for i in rng.permutation(len(false)):
        text = caption(false[i], draws(words), complete=complete)
        if text not in told:  # a mistake in what the caption does not tell is none
            told.append(text)
        if len(told) > count:
            break
    return told
