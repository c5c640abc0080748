"""The whole model: against diffusers from the same folder and seeds, and for the promises that a batch makes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdbatch.diffusion import SAMPLERS, LatentDiffusion, Reading, open_checkpoint
from sdbatch.diffusion.pipeline import vae_dtype
from sdbatch.errors import ModelError, UsageError
from tests.diffusion import tiny_models

PROMPTS = ["a red circle on a white background", "a green star above a blue square on a cream background"]


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    torch.set_num_threads(1)
    return LatentDiffusion.from_pretrained("builtin:shapes")


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LatentDiffusion]:
    """One of each, with random weights."""
    torch.set_num_threads(1)
    pipelines = {
        "sd1": tiny_models.sd1(),
        "sd1 inpainting": tiny_models.sd1(in_channels=9),
        "sd2 zero SNR": tiny_models.sd2(**tiny_models.ZERO_SNR),
        "sdxl": tiny_models.sdxl(),
        "sdxl refiner": tiny_models.refiner(),
    }
    folders = {name: tmp_path_factory.mktemp(name.replace(" ", "_")) for name in pipelines}
    return {
        name: LatentDiffusion.from_pretrained(tiny_models.save(pipeline, folders[name]))
        for name, pipeline in pipelines.items()
    }


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.mean((a.astype(float) - b.astype(float)) ** 2), 1e-12)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("sampler", "scheduler"), [("ddim", diffusers.DDIMScheduler), ("euler", diffusers.EulerDiscreteScheduler)]
)
def test_diffusers_opens_the_folder_and_makes_the_same_pictures(
    sampler: str, scheduler: type, model: LatentDiffusion
) -> None:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(open_checkpoint("builtin:shapes").path)
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
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(open_checkpoint("builtin:shapes").path)
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


@settings(max_examples=12)
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


def given_pictures(batch: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (batch, height, width, 3), dtype=np.uint8)


def given_masks(batch: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((batch, height, width)) < 0.5


def pictures_for(model: LatentDiffusion, start: str, batch: int, height: int, width: int) -> dict[str, Any]:
    """What ``generate`` is given to start from. An inpainting model always needs picture and mask."""
    if model.unet.config.in_channels == 9 or start == "repaint":
        return {
            "init_images": given_pictures(batch, height, width),
            "mask_images": given_masks(batch, height, width),
        }
    return {"init_images": given_pictures(batch, height, width)} if start == "picture" else {}


@settings(max_examples=30)
@given(
    name=st.sampled_from(["sd1", "sd1 inpainting", "sd2 zero SNR", "sdxl", "sdxl refiner"]),
    sampler=st.sampled_from(sorted(SAMPLERS)),
    steps=st.integers(1, 4),
    width=st.integers(3, 11),
    height=st.integers(3, 11),
    batch=st.integers(1, 3),
    guided=st.booleans(),
    start=st.sampled_from(["noise", "picture", "repaint"]),
    strength=st.sampled_from([0.3, 0.6, 1.0]),
)
def test_whatever_is_asked_for_gives_finite_latents_of_its_size(
    name: str,
    sampler: str,
    steps: int,
    width: int,
    height: int,
    batch: int,
    guided: bool,
    start: str,
    strength: float,
    families: dict[str, LatentDiffusion],
) -> None:
    model = families[name]
    settings = pictures_for(model, start, batch, 8 * height, 8 * width)
    if settings:
        settings["strength"] = max(strength, 1 / steps)
    latents = model.generate(
        ["a red circle"] * batch,
        seeds=range(batch),
        width=8 * width,
        height=8 * height,
        num_inference_steps=steps,
        guidance_scale=4.0 if guided else 1.0,
        sampler=sampler,
        output="latent",
        **settings,
    )
    assert latents.shape == (batch, 4, height, width)
    assert latents.dtype == torch.float32
    assert latents.isfinite().all()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", ["sd1", "sd2 zero SNR"])
def test_one_step_is_enough_for_any_sampler(name: str, sampler: str, families: dict[str, LatentDiffusion]) -> None:
    settings = {"width": 16, "height": 16, "sampler": sampler, "output": "latent"}
    one = families[name].generate(["a ring"], seeds=[1], num_inference_steps=1, **settings)
    assert one.isfinite().all()
    assert one.std() > 0


@settings(max_examples=25)
@given(
    name=st.sampled_from(["sd1", "sd1 inpainting", "sdxl", "sdxl refiner"]),
    sampler=st.sampled_from(sorted(SAMPLERS)),
    slot=st.integers(0, 2),
    others=st.lists(st.text(alphabet="ab ():1.5[", max_size=60), min_size=2, max_size=2),
    negatives=st.lists(st.sampled_from(["", "a ring", "(blurry:1.3)"]), min_size=2, max_size=2),
    start=st.sampled_from(["noise", "picture", "repaint"]),
    rescale=st.sampled_from([0.0, 0.7]),
)
def test_neighbours_never_change_a_picture_however_it_is_made(
    name: str,
    sampler: str,
    slot: int,
    others: list[str],
    negatives: list[str],
    start: str,
    rescale: float,
    families: dict[str, LatentDiffusion],
) -> None:
    model = families[name]
    plain = {"seeds": [1, 2, 3], "guidance_scale": [4.0, 4.0, 4.0], **pictures_for(model, start, 3, 16, 24)}
    changed = {
        "seeds": [4, 5, 6],
        "guidance_scale": [7.0, 2.0, 5.0],
        **{key: 255 - value if value.dtype == np.uint8 else ~value for key, value in plain.items() if "images" in key},
    }

    def latent(neighbours: list[str], their_negatives: list[str], settings: Mapping[str, Any]) -> torch.Tensor:
        result = model.generate(
            [*neighbours[:slot], "a (red:1.2) circle", *neighbours[slot:]],
            [*their_negatives[:slot], "blurry", *their_negatives[slot:]],
            width=24,
            height=16,
            num_inference_steps=2,
            sampler=sampler,
            guidance_rescale=rescale,
            reading=Reading("chunk", emphasis=True),
            chunks=6,
            output="latent",
            **settings,
        )
        return result[slot]

    for key, values in changed.items():
        values[slot] = plain[key][slot]
    assert torch.equal(latent(["", ""], ["", ""], plain), latent(others, negatives, changed))


def test_slices_change_next_to_nothing_and_small_pictures_are_not_tiled(families: dict[str, LatentDiffusion]) -> None:
    model = families["sd1"]
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    whole = model.decode(latents)
    try:
        model.vae_slicing = model.vae_tiling = True
        assert torch.allclose(model.decode(latents), whole, atol=1e-5)
        tiled = model.decode(torch.randn(1, 4, 12, 20, generator=torch.Generator().manual_seed(1)))
        assert tiled.shape == (1, 3, 96, 160)
    finally:
        model.vae_slicing = model.vae_tiling = False


def test_offloaded_text_encoders_say_the_same(families: dict[str, LatentDiffusion]) -> None:
    model = families["sdxl"]
    settings = {"seeds": [1], "num_inference_steps": 1, "output": "latent", "width": 16, "height": 16}
    before = model.generate(["a ring"], **settings)
    try:
        model.texts.offloaded = True
        assert torch.equal(model.generate(["a ring"], **settings), before)
    finally:
        model.texts.offloaded = False


def test_outside_its_interval_guidance_is_off(families: dict[str, LatentDiffusion]) -> None:
    model, settings = families["sd1"], {"seeds": [1], "num_inference_steps": 3, "output": "latent"}
    plain = model.generate(["a ring"], guidance_scale=1.0, **settings)
    always = model.generate(["a ring"], guidance_scale=5.0, **settings)
    late = model.generate(["a ring"], guidance_scale=5.0, guidance_interval=(0.5, 1.0), **settings)
    assert torch.equal(
        model.generate(["a ring"], guidance_scale=5.0, guidance_interval=(0.9999, 1.0), **settings), plain
    )
    assert not torch.equal(late, always)
    assert not torch.equal(late, plain)


@pytest.mark.parametrize(("prediction", "kept"), [(None, "epsilon"), ("v_prediction", "v_prediction")])
def test_what_the_network_predicts_can_be_told(prediction: str | None, kept: str, families: dict) -> None:
    path = families["sd1"].checkpoint.path
    assert open_checkpoint(str(path), prediction_type=prediction).schedule.prediction_type == kept


def test_float16_keeps_a_vae_that_overflows_in_float32(families: dict[str, LatentDiffusion]) -> None:
    kinds = {}
    for name in ("sd1", "sdxl"):
        config = families[name].vae.config
        for dtype in (torch.float16, torch.bfloat16):
            kinds[name, dtype] = vae_dtype(dataclasses.replace(config, force_upcast=name == "sdxl"), dtype)
    assert kinds == {
        ("sd1", torch.float16): torch.float16,
        ("sd1", torch.bfloat16): torch.bfloat16,
        ("sdxl", torch.float16): torch.float32,
        ("sdxl", torch.bfloat16): torch.bfloat16,
    }


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
        ({"seeds": [1], "num_inference_steps": 51, "sampler": "lcm"}, "use 1 to 50 with sampler 'lcm'"),
        ({"seeds": [1], "num_inference_steps": 1000, "sampler": "dpmpp_2m"}, "use 1 to 99[89] with"),
        ({"seeds": [1], "mask_images": given_masks(1, 64, 64)}, "must be given together"),
        (
            {"seeds": [1], "init_images": given_pictures(1, 64, 32)},
            r"init_images is uint8 of shape \(1, 64, 32, 3\); use",
        ),
        ({"seeds": [1], "init_images": given_pictures(2, 64, 64)}, r"of shape .* use uint8 of shape \(1, 64, 64, 3\)"),
        (
            {"seeds": [1], "init_images": given_pictures(1, 64, 64), "mask_images": given_masks(1, 32, 64)},
            r"mask_images is bool of shape \(1, 32, 64\); use bool of shape \(1, 64, 64\)",
        ),
        ({"seeds": [1], "init_images": given_pictures(1, 64, 64), "strength": 0.01}, "leaves no step to take"),
        ({"seeds": [1], "reading": Reading(clip_skip=12)}, r"clip_skip is 12, but the text encoder has \d layers"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, told: str, model: LatentDiffusion) -> None:
    with pytest.raises(UsageError, match=told):
        model.generate(["x"], **arguments)


def test_a_missing_weight_is_named_before_anything_is_computed(model: LatentDiffusion, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "broken")
    (tmp_path / "broken/vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"vae/diffusion_pytorch_model\.safetensors is missing"):
        open_checkpoint(str(tmp_path / "broken"))


def test_weights_of_another_shape_are_refused(model: LatentDiffusion, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "odd")
    config = tmp_path / "odd/unet/config.json"
    config.write_text(config.read_text().replace('"out_channels": 4', '"out_channels": 8'))
    with pytest.raises(ModelError, match=r"conv_out\.weight is \(.*\) but should be"):
        LatentDiffusion.from_pretrained(tmp_path / "odd")


def test_pickles_and_unknown_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"pickle.*convert it to \.safetensors"):
        open_checkpoint(str(tmp_path / "model.ckpt"))
    with pytest.raises(ModelError, match="there is: builtin:shapes"):
        open_checkpoint("builtin:nothing")
    with pytest.raises(ModelError, match=r"has no model_index\.json"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd2 zero SNR"])
def test_neither_neighbours_nor_repeated_prompts_change_a_picture(
    name: str, families: dict[str, LatentDiffusion]
) -> None:
    def second(neighbours: list[str], negatives: list[str], interval: tuple[float, float]) -> torch.Tensor:
        return families[name].generate(
            [neighbours[0], "a ring", neighbours[1]],
            [negatives[0], "a star", negatives[1]],
            seeds=[1, 2, 3],
            num_inference_steps=2,
            guidance_interval=interval,
            output="latent",
        )[1]

    for interval in ((0.0, 1.0), (0.5, 1.0)):
        among = second(["a cross", "a red circle"], ["", "blue"], interval)
        assert torch.equal(second(["a ring", "a ring"], ["a star", "a star"], interval), among)
        assert torch.equal(second(["", "a ring"], ["a ring", ""], interval), among)


def test_text_is_told_to_the_network_once_for_all_steps(
    families: dict[str, LatentDiffusion], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = families["sdxl"]
    told: list[int] = []
    keys_values = model.unet.keys_values
    monkeypatch.setattr(model.unet, "keys_values", lambda context: told.append(len(context)) or keys_values(context))
    model.generate(["a ring"], seeds=[1], num_inference_steps=4, output="latent")
    assert told == [2], "wanted and unwanted together"
    model.generate(["a ring"], seeds=[1], num_inference_steps=4, guidance_interval=(0.5, 1.0), output="latent")
    assert told == [2, 2, 1], "and the wanted alone, for steps without guidance"
