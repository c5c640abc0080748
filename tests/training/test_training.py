"""The training itself: a few steps, stopped and resumed to the same weights, alone and by two workers."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor, nn

from sdbatch.diffusion import LatentDiffusion, open_checkpoint
from sdbatch.diffusion.clip import CLIP
from sdbatch.diffusion.schedule import NoiseSchedule
from sdbatch.diffusion.vae import VAE
from sdbatch.errors import ModelError
from sdbatch.training import Recipe, loop, trainer
from sdbatch.training.architecture import VAE_CONFIG, noise_schedule
from sdbatch.training.autoencoder import normalise_latents, picture_batch
from sdbatch.training.drawn import DrawnExamples, encode_scenes, training_scenes, word_swap
from sdbatch.training.loop import Step, draws, train
from sdbatch.training.monitor import contact_sheet
from sdbatch.training.objective import Batch, Objective
from sdbatch.training.recipe import Plan

TINY = Recipe(
    workers=1,
    pictures=128,
    vae_steps=4,
    vae_batch=2,
    clip_steps=4,
    clip_batch=2,
    steps=4,
    batch=4,
    warmup=2,
    checkpoint_every=2,
    sample_steps=1,
)


def silent(stage: str, done: int, total: int, text: str) -> None:
    pass


def digest(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    trainer.run(TINY, folder, silent)
    return folder


@pytest.mark.parametrize("stage", ["vae", "scorer", "denoiser"])
def test_a_stopped_training_resumes_to_the_same_weights(stage: str, whole: Path, tmp_path: Path) -> None:
    def stop(now: str, done: int, total: int, text: str) -> None:
        if (now, done) == (stage, 3):
            raise Stopped

    with pytest.raises(Stopped):
        trainer.run(TINY, tmp_path, stop)
    trainer.run(TINY, tmp_path, silent)
    for result in ("model", "scorer"):
        assert digest(tmp_path / result) == digest(whole / result)


def test_a_training_leaves_a_model_a_scorer_samples_and_curves(whole: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert set(digest(whole / "model")) == set(digest(open_checkpoint("builtin:shapes").path)) - {"README.md"}
    assert CLIP.from_pretrained(whole / "scorer").score(np.zeros((1, 64, 64, 3), np.uint8), ["a red circle"]).shape
    assert (whole / "samples/0000004.png").is_file()
    curves = EventAccumulator(str(whole / "tensorboard"))
    curves.Reload()
    assert "word swap/colour" in curves.Tags()["scalars"]
    assert curves.Tags()["images"] == ["samples"]


def test_a_network_may_learn_to_say_epsilon(tmp_path: Path) -> None:
    trainer.run(dataclasses.replace(TINY, prediction_type="epsilon", steps=1), tmp_path, silent)
    model = LatentDiffusion.from_pretrained(tmp_path / "model")
    assert model.schedule.prediction_type == "epsilon"
    assert float(model.schedule.alphas_cumprod[-1]) > 0
    assert model.generate(["a red circle"], seeds=[1], num_inference_steps=2, output="latent").isfinite().all()


def test_workers_under_ray_train_one_model_also_when_one_dies(
    ray_here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(TINY, workers=2, vae_steps=1, clip_steps=1, steps=3, checkpoint_every=1)
    told: list[str] = []
    trainer.run(recipe, tmp_path / "whole", lambda stage, done, total, text: told.append(stage))
    assert told[-1] == "denoiser"
    model = LatentDiffusion.from_pretrained(tmp_path / "whole/model")
    assert model.generate(["a red circle"], seeds=[1], num_inference_steps=2).shape == (1, 64, 64, 3)

    killed = []

    def kill(stage: str, done: int, total: int, text: str) -> None:
        if stage == "denoiser" and not killed:
            worker = next(child for child in psutil.Process().children(recursive=True) if trains(child))
            worker.kill()
            killed.append(worker)

    monkeypatch.chdir(tmp_path)
    shutil.copytree("whole/state", "killed/state", ignore=shutil.ignore_patterns("denoiser*"))
    trainer.run(recipe, Path("killed"), kill)
    assert killed
    assert digest(tmp_path / "killed/model") == digest(tmp_path / "whole/model")


def trains(process: psutil.Process) -> bool:
    try:
        return "ray::RayTrainWorker" in " ".join(process.cmdline())
    except psutil.Error:
        return False


# -- the loop --------------------------------------------------------------------------------------------------


class Line(nn.Module):
    """The mean of w · x."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.w * x).sum(dim=-1).mean()


def learn(plan: Plan, folder: Path) -> tuple[Line, list[Step]]:
    line, steps = Line(), []

    def loss(rng: np.random.Generator) -> Tensor:
        value: Tensor = line(torch.from_numpy(rng.standard_normal((2, 3), dtype=np.float32)))
        return value

    train(line, loss, plan, folder, steps.append)
    return line, steps


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    plan = Plan("x", steps=110, learning_rate=1.0, warmup=10, seed=0, checkpoint_every=10)
    assert [plan.rate(step) for step in (0, 9, 10)] == [0.1, 1.0, 1.0]
    assert plan.rate(60) == pytest.approx(0.5)
    assert plan.rate(109) < 0.001


def test_accumulated_gradients_are_the_mean_over_the_batches(tmp_path: Path) -> None:
    plan = Plan("x", steps=1, learning_rate=0.1, warmup=1, seed=7, checkpoint_every=1, accumulate=3)
    _, steps = learn(plan, tmp_path)
    batches = [draws(7, "x", 0, 0, *part).standard_normal((2, 3), dtype=np.float32) for part in ([], [1], [2])]
    gradient = np.concatenate(batches).mean(axis=0)
    assert steps[0].gradient_norm == pytest.approx(float(np.linalg.norm(gradient)), rel=1e-5)
    assert steps[0].loss == pytest.approx(float(gradient.sum()), rel=1e-4)


def test_frozen_weights_stay_and_the_average_follows(tmp_path: Path) -> None:
    plan = Plan("x", steps=8, learning_rate=0.1, warmup=1, seed=0, checkpoint_every=8)
    plain, _ = learn(plan, tmp_path / "plain")
    averaged, _ = learn(dataclasses.replace(plan, ema_decay=0.9), tmp_path / "averaged")
    assert float(plain.frozen) == 1
    start = torch.ones(3)
    assert ((averaged.w - start).abs() < (plain.w - start).abs()).all()


def test_the_state_of_another_training_is_refused(tmp_path: Path) -> None:
    plan = Plan("x", steps=1, learning_rate=0.1, warmup=1, seed=0, checkpoint_every=1)
    learn(plan, tmp_path)
    other = nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"x\.safetensors is the state of another training"):
        train(other, lambda rng: other(torch.ones(2)).sum(), plan, tmp_path, lambda step: None)


def test_moments_come_back_in_the_layout_of_their_weights(tmp_path: Path) -> None:
    """The fused optimizer refuses others on a GPU, where the U-Net's channels come last."""
    network = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    optimizer, again = (torch.optim.AdamW(network.parameters(), fused=True) for _ in range(2))
    network(torch.randn(1, 4, 8, 8)).sum().backward()
    optimizer.step()
    parameters = dict(network.named_parameters())
    loop._save(tmp_path / "x.safetensors", 1, parameters, None, optimizer)
    loop._restore(tmp_path / "x.safetensors", parameters, None, again)
    for name in ("exp_avg", "exp_avg_sq"):
        before, after = optimizer.state[network.weight][name], again.state[network.weight][name]
        assert torch.equal(before, after)
        assert after.stride() == network.weight.stride()


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    plan = Plan("x", steps=2, learning_rate=0.1, warmup=1, seed=0, checkpoint_every=1)
    learn(plan, tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"x\.safetensors is damaged: .* remove it"):
        learn(plan, tmp_path)


# -- what is learnt --------------------------------------------------------------------------------------------


def test_latents_come_out_standardised_and_pictures_stay_the_same() -> None:
    torch.manual_seed(0)
    vae = VAE(VAE_CONFIG).eval().requires_grad_(False)
    images = picture_batch(draws(0, "test"), 8)
    before, spread = vae.encode(images)
    drawn = vae.decode(before)
    told = normalise_latents(vae, before)
    after, log_variance = vae.encode(images)
    assert torch.allclose(after, told, atol=1e-3)
    assert torch.allclose(after.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-3)
    assert torch.allclose(after.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-3)
    assert torch.allclose(vae.decode(after), drawn, atol=1e-4)
    ratio = (0.5 * (log_variance - spread)).exp() * before.std(dim=(0, 2, 3))[:, None, None]
    assert torch.allclose(ratio, torch.ones_like(ratio), atol=1e-3)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weighs_the_error_in_the_latents_by_the_bounded_snr(kind: str) -> None:
    schedule = NoiseSchedule(prediction_type=kind)
    z0, rng = torch.zeros(1, 4, 8, 8), np.random.default_rng(0)
    for t in (10, 500, 999):

        class At(Objective):
            def timesteps(self, rng: np.random.Generator, count: int, schedule: NoiseSchedule) -> Tensor:
                return torch.full((count,), t)  # noqa: B023

        def silent_network(z: Tensor, timesteps: Tensor, prompts: object) -> Tensor:
            return torch.zeros_like(z)

        plain, bounded = (
            float(At(min_snr_gamma=gamma).loss(silent_network, schedule, Batch(z0, [""]), np.random.default_rng(0)))  # type: ignore[arg-type]
            for gamma in (None, 5.0)
        )
        square = float(schedule.alphas_cumprod[t])
        snr = square / (1 - square)
        expected = min(snr, 5) / (snr if kind == "epsilon" else snr + 1)
        assert bounded / plain == pytest.approx(expected, rel=1e-4)
    del rng


def test_timesteps_are_stratified_and_lean_to_high_noise() -> None:
    steps = Objective(timestep_exponent=0.75).timesteps(draws(0), 64, noise_schedule("v_prediction"))
    assert (steps.diff() >= 0).all()
    assert 0 <= steps[0] < 60
    assert steps.float().mean() > 550


def test_the_shipped_model_listens_to_every_word(tmp_path: Path) -> None:
    model = LatentDiffusion.from_pretrained("builtin:shapes")
    scenes = training_scenes(3, 240)
    latents, covers = encode_scenes(model.vae, scenes, tmp_path, lambda done, total: None)
    swaps = word_swap(model, DrawnExamples(scenes, latents, covers, 0.0, 1.0))
    assert all(growth > 5 for growth in swaps.values()), swaps


def test_a_contact_sheet_reads_from_left_to_right() -> None:
    pictures = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    sheet = contact_sheet(pictures, columns=2)
    assert sheet[::2, ::2, 0].tolist() == [[0, 1], [2, 255]]
