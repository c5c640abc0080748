"""The world, its captions, and the training itself: a few steps, stopped and resumed to the same weights."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from sdbatch.diffusion import LatentDiffusion, open_checkpoint
from sdbatch.diffusion.vae import VAE
from sdbatch.training import Recipe, trainer
from sdbatch.training.architecture import VAE_CONFIG
from sdbatch.training.autoencoder import normalise_latents, picture_batch
from sdbatch.training.captions import caption, vocabulary
from sdbatch.training.loop import Plan, draws
from sdbatch.training.tokens import learn_tokenizer
from sdbatch.training.world import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing, draw, random_scene

TINY = Recipe(workers=1, pictures=128, vae_steps=4, vae_batch=2, steps=4, batch=4, warmup=2, checkpoint_every=2)


def silent(stage: str, done: int, total: int, text: str) -> None:
    pass


def digest(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stage", ["vae", "denoiser"])
def test_a_stopped_training_resumes_to_the_same_weights(stage: str, tmp_path: Path) -> None:
    trainer.run(TINY, tmp_path / "whole", tmp_path / "whole/model", silent)

    def stop(now: str, done: int, total: int, text: str) -> None:
        if (now, done) == (stage, 3):
            raise Stopped

    with pytest.raises(Stopped):
        trainer.run(TINY, tmp_path / "parts", tmp_path / "parts/model", stop)
    trainer.run(TINY, tmp_path / "parts", tmp_path / "parts/model", silent)
    assert digest(tmp_path / "parts/model") == digest(tmp_path / "whole/model")
    assert set(digest(tmp_path / "whole/model")) == set(digest(open_checkpoint("builtin:shapes").path)) - {"README.md"}


def test_two_workers_train_one_model(tmp_path: Path) -> None:
    trainer.run(dataclasses.replace(TINY, workers=2), tmp_path, tmp_path / "model", silent)
    model = LatentDiffusion.from_pretrained(tmp_path / "model")
    assert model.generate(["a red circle"], seeds=[1], num_inference_steps=2).shape == (1, 64, 64, 3)


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    plan = Plan("x", steps=110, learning_rate=1.0, warmup=10, seed=0, checkpoint_every=10)
    assert [plan.rate(step) for step in (0, 9, 10)] == [0.1, 1.0, 1.0]
    assert plan.rate(60) == pytest.approx(0.5)
    assert plan.rate(109) < 0.001


def test_latents_come_out_standardised_and_pictures_stay_the_same() -> None:
    torch.manual_seed(0)
    vae = VAE(VAE_CONFIG).eval().requires_grad_(False)
    images = picture_batch(draws(0, "test"), 8)
    before, spread = vae.encode(images)
    drawn = vae.decode(before)
    normalise_latents(vae, before)
    after, log_variance = vae.encode(images)
    assert torch.allclose(after.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-3)
    assert torch.allclose(after.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-3)
    assert torch.allclose(vae.decode(after), drawn, atol=1e-4)
    ratio = (0.5 * (log_variance - spread)).exp() * before.std(dim=(0, 2, 3))[:, None, None]
    assert torch.allclose(ratio, torch.ones_like(ratio), atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_drawn_in_its_colour_on_its_background(shape: str) -> None:
    scene = Scene("light blue", (Thing(shape, "red", "large", 0.5, 0.5, 0.28),), place="center")
    picture, cover = draw(scene)
    assert picture.shape == (64, 64, 3)
    assert 0.08 < cover.mean() < 0.26
    inside = picture[cover > 0.99].mean(axis=0)
    assert np.abs(inside - COLOURS["red"]).max() < 25
    assert np.abs(picture[:3, :3].mean(axis=(0, 1)) - BACKGROUNDS["light blue"]).max() < 10


def test_captions_name_colour_and_shape_and_every_word_is_one_token() -> None:
    tokenizer = learn_tokenizer(vocabulary(), 48)
    rng = draws(0, "captions")
    for _ in range(300):
        scene = random_scene(rng)
        text = caption(scene, rng)
        assert all(thing.colour in text for thing in scene.things)
        words = text.replace(",", " ,").split()
        assert len(tokenizer.encode([text])[0]) == len(words)


def test_scenes_come_from_their_seed_alone() -> None:
    assert [random_scene(draws(3, "s")) for _ in range(2)] == [random_scene(draws(3, "s")) for _ in range(2)]
    assert random_scene(draws(3, "s")) != random_scene(draws(4, "s"))
