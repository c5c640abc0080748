"""The model that is shipped: small samples of what its card claims, with room for chance."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sdbatch.diffusion import LatentDiffusion
from sdbatch.diffusion.clip import CLIP
from sdbatch.evaluation.prompts import CELLS
from sdbatch.training.autoencoder import as_tensor
from sdbatch.training.captions import caption
from sdbatch.training.checker import compare, read
from sdbatch.training.loop import draws
from sdbatch.training.scorer import ranks_first
from sdbatch.training.world import draw, random_scene

MODELS = Path(__file__).parents[2] / "sdbatch/models"


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return LatentDiffusion.from_pretrained("builtin:shapes")


@pytest.mark.parametrize("cell", CELLS)
def test_pictures_show_what_prompts_say(cell: str, model: LatentDiffusion) -> None:
    things, novel = CELLS[cell]
    rng = draws(11, cell)
    scenes = [random_scene(rng, things, novel=novel) for _ in range(16)]
    prompts = [caption(scene, rng, complete=True) for scene in scenes]
    pictures = model.generate(prompts, seeds=range(16), guidance_scale=3.0, sampler="dpmpp_2m")
    agreements = [compare(scene, read(picture)) for scene, picture in zip(scenes, pictures, strict=True)]
    assert np.mean([agreement.background for agreement in agreements]) > 0.9
    assert np.mean([agreement.all for agreement in agreements]) > 0.8


def test_the_vae_carries_pictures_that_it_never_saw(model: LatentDiffusion) -> None:
    rng = draws(12, "vae")
    scenes = [random_scene(rng, novel=True) for _ in range(48)]
    pictures = np.stack([draw(scene)[0] for scene in scenes])
    with torch.inference_mode():
        decoded = model.decode(model.vae.config.scaling_factor * model.vae.encode(as_tensor(pictures))[0])
    restored = (decoded * 255).round().permute(0, 2, 3, 1).numpy().astype(np.uint8)
    error = ((restored.astype(float) - pictures) ** 2).mean()
    assert 10 * np.log10(255**2 / error) >= 32
    right = [compare(scene, read(picture)).all for scene, picture in zip(scenes, restored, strict=True)]
    assert np.mean(right) >= 0.97


@pytest.mark.parametrize("cell", CELLS)
def test_the_scorer_puts_the_true_caption_first(cell: str) -> None:
    things, novel = CELLS[cell]
    rng = draws(13, cell)
    clip = CLIP.from_pretrained(MODELS / "shapes-clip")
    assert np.mean(ranks_first(clip, [random_scene(rng, things, novel=novel) for _ in range(60)], rng)) >= 0.95


def test_the_built_in_weights_stay_small() -> None:
    files = [path for path in MODELS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16_000_000
    assert json.loads((MODELS / "shapes/model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
