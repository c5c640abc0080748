"""The whole model: against diffusers from the same folder and seeds, and for the promises that a batch makes."""

from __future__ import annotations

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdbatch.diffusion import SAMPLERS, LatentDiffusion, describe
from sdbatch.errors import ModelError, UsageError

PROMPTS = ["a red circle on a white background", "a green star above a blue square on a cream background"]


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    torch.set_num_threads(1)
    return LatentDiffusion.from_pretrained("builtin:shapes")


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.mean((a.astype(float) - b.astype(float)) ** 2), 1e-12)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("sampler", "scheduler"), [("ddim", diffusers.DDIMScheduler), ("euler", diffusers.EulerDiscreteScheduler)]
)
def test_diffusers_opens_the_folder_and_makes_the_same_pictures(
    sampler: str, scheduler: type, model: LatentDiffusion
) -> None:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(describe("builtin:shapes").folder)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    seeds = [7, 8]
    theirs = pipeline(
        PROMPTS,
        negative_prompt=["", "a blurry ring"],
        num_inference_steps=20,
        guidance_scale=5.0,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        output_type="np",
    ).images
    ours = model.generate(
        PROMPTS, ["", "a blurry ring"], seeds=seeds, num_inference_steps=20, guidance_scale=5.0, sampler=sampler
    )
    assert ours.shape == (2, 64, 64, 3)
    assert ours.dtype == np.uint8
    assert psnr(ours, np.round(theirs * 255)) >= 45


@pytest.mark.filterwarnings("ignore")
def test_we_open_what_diffusers_saves(model: LatentDiffusion, tmp_path: Path) -> None:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(describe("builtin:shapes").folder)
    pipeline.save_pretrained(tmp_path)
    again = LatentDiffusion.from_pretrained(tmp_path)
    settings = {"seeds": [3, 4], "num_inference_steps": 3, "output": "latent"}
    assert torch.equal(model.generate(PROMPTS, **settings), again.generate(PROMPTS, **settings))


def test_the_built_in_model_draws_what_the_prompt_says(model: LatentDiffusion) -> None:
    picture = model.generate(["a large red circle in the center on a white background"], seeds=[1])[0].astype(int)
    middle, corner = picture[28:36, 28:36].mean(axis=(0, 1)), picture[:4, :4].mean(axis=(0, 1))
    assert middle[0] > 150
    assert max(middle[1:]) < 100
    assert min(corner) > 225


def test_a_folder_survives_saving_and_loading(model: LatentDiffusion, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "copy")
    again = LatentDiffusion.from_pretrained(tmp_path / "copy")
    settings = {"seeds": [3], "num_inference_steps": 3, "output": "latent"}
    assert torch.equal(model.generate(PROMPTS[:1], **settings), again.generate(PROMPTS[:1], **settings))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sampler=st.sampled_from(sorted(SAMPLERS)),
    slot=st.integers(0, 2),
    others=st.lists(st.text(max_size=40), min_size=2, max_size=2),
    guided=st.booleans(),
)
def test_neighbours_never_change_a_picture(
    sampler: str, slot: int, others: list[str], guided: bool, model: LatentDiffusion
) -> None:
    def latent(neighbours: list[str], seeds: list[int]) -> torch.Tensor:
        prompts = [*neighbours[:slot], "a red circle", *neighbours[slot:]]
        chosen = [*seeds[:slot], 5, *seeds[slot:]]
        result = model.generate(
            prompts,
            seeds=chosen,
            num_inference_steps=2,
            guidance_scale=4.0 if guided else 1.0,
            sampler=sampler,
            output="latent",
        )
        assert result.shape == (3, 4, 16, 16)
        assert result.isfinite().all()
        return result[slot]

    assert torch.equal(latent(["", ""], [0, 0]), latent(others, [1, 2]))


def test_a_seed_means_one_cpu_generator_an_image(model: LatentDiffusion) -> None:
    """With Euler ancestral each step draws from the same stream that drew the start."""
    one = model.generate(["a ring"], seeds=[4], num_inference_steps=3, sampler="euler_ancestral", output="latent")
    two = model.generate(["a ring"], seeds=[4], num_inference_steps=3, sampler="euler_ancestral", output="latent")
    other = model.generate(["a ring"], seeds=[5], num_inference_steps=3, sampler="euler_ancestral", output="latent")
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"seeds": [1, 2]}, "seeds has 2 entries for 1 prompts"),
        ({"seeds": [1], "sampler": "eulr"}, "sampler 'eulr' is not known"),
        ({"seeds": [1], "width": 30}, "width is 30; use a positive multiple of 4"),
        ({"seeds": [1], "num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"seeds": [1], "guidance_scale": [1.0, 2.0]}, "guidance_scale has 2 entries"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, told: str, model: LatentDiffusion) -> None:
    with pytest.raises(UsageError, match=told):
        model.generate(["x"], **arguments)


def test_a_missing_weight_is_named_before_anything_is_computed(model: LatentDiffusion, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "broken")
    (tmp_path / "broken/vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"vae/diffusion_pytorch_model\.safetensors is missing"):
        describe(str(tmp_path / "broken"))


def test_weights_of_another_shape_are_refused(model: LatentDiffusion, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "odd")
    config = tmp_path / "odd/unet/config.json"
    config.write_text(config.read_text().replace('"cross_attention_dim": 128', '"cross_attention_dim": 96'))
    with pytest.raises(ModelError, match=r"attn2\.to_k\.weight is \(.*\) but should be"):
        LatentDiffusion.from_pretrained(tmp_path / "odd")


def test_pickles_and_unknown_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"pickle.*convert it to \.safetensors"):
        describe(str(tmp_path / "model.ckpt"))
    with pytest.raises(ModelError, match="there is: builtin:shapes"):
        describe("builtin:nothing")
    with pytest.raises(ModelError, match=r"has no model_index\.json"):
        describe(str(tmp_path))
