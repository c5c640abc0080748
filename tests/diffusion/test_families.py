"""Whole pipelines of every family against diffusers', from the same folder, prompts, pictures and seeds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch
from torch import Tensor

from sdbatch.diffusion import LatentDiffusion, Lora, Reading, TextualInversion
from sdbatch.diffusion.configs import read_unet_config
from sdbatch.diffusion.original_names import unet_modules
from sdbatch.errors import ModelError
from tests.diffusion import tiny_models

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers warn of one another

PROMPTS = ["a red circle", "a green star above a blue square"]
NEGATIVES = ["blurry", "a ring on a cream background"]
SEEDS = (7, 8)
SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "lcm": diffusers.LCMScheduler,
}

MODELS = {
    "sd1": tiny_models.sd1,
    "sd1 inpainting": lambda: tiny_models.sd1(in_channels=9),
    "sd2": tiny_models.sd2,
    "sd2 zero SNR": lambda: tiny_models.sd2(**tiny_models.ZERO_SNR),
    "sdxl": tiny_models.sdxl,
    "sdxl refiner": tiny_models.refiner,
}


@dataclasses.dataclass
class Pair:
    """A model as diffusers runs it, and the folder that it saved."""

    pipeline: Any
    folder: Path

    def theirs(
        self, kind: type | None = None, sampler: str = "ddim", prompts: list[str] = PROMPTS, **settings: Any
    ) -> Tensor:
        pipeline = (kind or type(self.pipeline))(**self.pipeline.components, **_settings(self.pipeline))
        pipeline.scheduler = SCHEDULERS[sampler].from_pretrained(self.folder, subfolder="scheduler")
        return run(pipeline, prompts, **settings)

    def ours(self, prompts: list[str] = PROMPTS, negatives: list[str] | None = NEGATIVES, **settings: Any) -> Tensor:
        return draw(LatentDiffusion.from_pretrained(self.folder), prompts, negatives, **settings)


def _settings(pipeline: Any) -> dict[str, Any]:
    names = ("requires_aesthetics_score", "force_zeros_for_empty_prompt")
    settings = {name: pipeline.config[name] for name in names if name in pipeline.config}
    return settings or {"requires_safety_checker": False}


def run(pipeline: Any, prompts: list[str] = PROMPTS, **settings: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in SEEDS]
    arguments = {"negative_prompt": NEGATIVES, "num_inference_steps": 5, "guidance_scale": 5.0, **settings}
    return pipeline(prompts, generator=generators, output_type="latent", **arguments).images


def draw(
    model: LatentDiffusion, prompts: list[str] = PROMPTS, negatives: list[str] | None = NEGATIVES, **settings: Any
) -> Tensor:
    return model.generate(
        prompts,
        negatives,
        seeds=SEEDS,
        output="latent",
        **{"num_inference_steps": 5, "guidance_scale": 5.0, **settings},
    )


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """And two different pictures, none of them a constant: or else little would have been compared."""
    assert theirs.isfinite().all()
    assert relative_error(theirs[0], theirs[1]) > 0.1
    assert relative_error(ours, theirs) <= 1e-4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    pairs = {}
    for name, make in MODELS.items():
        pipeline = make()
        pairs[name] = Pair(pipeline, tiny_models.save(pipeline, tmp_path_factory.mktemp(name.replace(" ", "_"))))
    return pairs


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """Two with something in them, 80 wide and 64 high."""
    y, x = np.mgrid[0:64, 0:80]
    one = np.stack([2 * y, 3 * x, 4 * (x - y) ** 2 // 64], axis=-1)
    other = np.stack([(x // 8 + y // 8) % 2 * 255, 255 - y, x + y], axis=-1)
    return np.stack([one, other]).astype(np.uint8)


@pytest.fixture(scope="module")
def masks() -> np.ndarray:
    """Two, each with edges that are no multiples of 8."""
    masks = np.zeros((2, 64, 80), dtype=bool)
    masks[0, 20:50, 10:61] = True
    masks[1, :, 33:] = True
    return masks


def as_pil(arrays: np.ndarray) -> list[PIL.Image.Image]:
    return [PIL.Image.fromarray(array.astype(np.uint8) * 255 if array.ndim == 2 else array) for array in arrays]


# -- from text -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_text_to_picture(name: str, sampler: str, models: dict[str, Pair]) -> None:
    size = {"height": 64, "width": 80}
    assert_same(models[name].ours(sampler=sampler, **size), models[name].theirs(sampler=sampler, **size))


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m"])
def test_sd2_at_zero_terminal_snr_with_its_contrast_pulled_back(sampler: str, models: dict[str, Pair]) -> None:
    pair, settings = models["sd2 zero SNR"], {"guidance_rescale": 0.7}
    assert_same(pair.ours(sampler=sampler, **settings), pair.theirs(sampler=sampler, **settings))
    assert relative_error(pair.ours(sampler=sampler), pair.ours(sampler=sampler, **settings)) > 1e-2


def test_no_guidance_needs_no_negative_prompt(models: dict[str, Pair]) -> None:
    pair = models["sd1"]
    assert_same(pair.ours(guidance_scale=1.0), pair.theirs(guidance_scale=1.0))


def test_sdxl_without_a_negative_prompt_is_guided_away_from_zeros(models: dict[str, Pair]) -> None:
    pair = models["sdxl"]
    ours = pair.ours(negatives=None)
    assert_same(ours, pair.theirs(negative_prompt=None))
    assert torch.equal(ours, pair.ours(negatives=["", ""]))
    some = pair.ours(negatives=["", NEGATIVES[1]])
    assert torch.equal(some[0], ours[0]), "each prompt by itself is empty or not"
    assert relative_error(some[1], ours[1]) > 1e-2


def test_sdxl_without_zeros_for_an_empty_prompt_encodes_it(models: dict[str, Pair], tmp_path: Path) -> None:
    pipeline = diffusers.StableDiffusionXLPipeline(
        **models["sdxl"].pipeline.components, force_zeros_for_empty_prompt=False
    )
    pair = Pair(pipeline, tiny_models.save(pipeline, tmp_path))
    assert_same(pair.ours(negatives=None), pair.theirs(negative_prompt=None))


def test_sdxl_is_told_the_size(models: dict[str, Pair]) -> None:
    pair, wide = models["sdxl"], {"height": 64, "width": 128}
    assert_same(pair.ours(**wide), pair.theirs(**wide))
    square = {"original_size": (64, 64), "target_size": (64, 64)}
    assert relative_error(pair.theirs(**wide, **square), pair.theirs(**wide)) > 1e-2


@pytest.mark.parametrize(("name", "skipped"), [("sd1", 1), ("sd1", 2), ("sdxl", 1)])
def test_layers_of_the_text_encoder_can_be_left_out(name: str, skipped: int, models: dict[str, Pair]) -> None:
    pair = models[name]
    # diffusers looks for the last norm where earlier releases of transformers had it.
    object.__setattr__(pair.pipeline.text_encoder, "text_model", pair.pipeline.text_encoder)
    ours = pair.ours(reading=Reading(clip_skip=skipped))
    assert_same(ours, pair.theirs(clip_skip=skipped))
    assert relative_error(pair.ours(), ours) > 1e-2


def test_ddim_with_noise(models: dict[str, Pair]) -> None:
    assert_same(models["sd1"].ours(eta=0.5), models["sd1"].theirs(eta=0.5))


# -- from pictures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sd1", diffusers.StableDiffusionImg2ImgPipeline),
        ("sdxl", diffusers.StableDiffusionXLImg2ImgPipeline),
        ("sdxl refiner", diffusers.StableDiffusionXLImg2ImgPipeline),
    ],
)
def test_picture_to_picture(name: str, kind: type, sampler: str, models: dict[str, Pair], pictures: np.ndarray) -> None:
    pair = models[name]
    theirs = pair.theirs(kind, sampler, image=as_pil(pictures), strength=0.6)
    ours = pair.ours(sampler=sampler, init_images=pictures, strength=0.6, width=80, height=64)
    assert_same(ours, theirs)


def test_the_refiner_knows_good_from_bad(models: dict[str, Pair], pictures: np.ndarray) -> None:
    pair, image = models["sdxl refiner"], as_pil(pictures)
    level = pair.theirs(image=image, strength=0.6, aesthetic_score=4.0, negative_aesthetic_score=4.0)
    assert relative_error(pair.theirs(image=image, strength=0.6), level) > 1e-3


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m"])
@pytest.mark.parametrize(
    ("name", "strength"), [("sd1", 1.0), ("sd1", 0.6), ("sd1 inpainting", 1.0), ("sd1 inpainting", 0.8)]
)
def test_inpainting(
    name: str, sampler: str, strength: float, models: dict[str, Pair], pictures: np.ndarray, masks: np.ndarray
) -> None:
    """A model with channels for it sees mask and rest; any other has the rest put back after every step."""
    pair = models[name]
    theirs = pair.theirs(
        diffusers.StableDiffusionInpaintPipeline,
        sampler,
        image=as_pil(pictures),
        mask_image=as_pil(masks),
        strength=strength,
        width=80,
        height=64,
    )
    ours = pair.ours(sampler=sampler, init_images=pictures, mask_images=masks, strength=strength, width=80, height=64)
    assert_same(ours, theirs)


# -- layouts and adaptations -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny_models.sd1(width=768, layers=1),
        lambda: tiny_models.sd1(width=768, layers=1, in_channels=9),
        tiny_models.sdxl,
        lambda: tiny_models.sdxl(**tiny_models.ZERO_SNR),
        tiny_models.refiner,
    ],
    ids=["sd1", "sd1 inpainting", "sdxl", "sdxl of v at zero SNR", "refiner"],
)
def test_a_single_file_draws_what_the_folder_draws(
    make: Any, pictures: np.ndarray, masks: np.ndarray, tmp_path: Path
) -> None:
    folder = tiny_models.save(make(), tmp_path / "folder")
    model = LatentDiffusion.from_pretrained(folder)
    model.save_single_file(tmp_path / "model.safetensors")
    again = LatentDiffusion.from_pretrained(
        tmp_path / "model.safetensors",
        tokenizer=str(next(folder.glob("tokenizer*"))),
        prediction_type=model.schedule.prediction_type,
    )
    settings: dict[str, Any] = {"width": 80, "height": 64, "num_inference_steps": 3}
    if model.unet.config.in_channels == 9:
        settings |= {"init_images": pictures, "mask_images": masks}
    stored, read = model.unet.state_dict(), again.unet.state_dict()
    assert all(torch.equal(read[name], weights) for name, weights in stored.items())
    # Not to the last bit: where a weight lies in its file says how it is aligned, and by that some CPUs' kernels round.
    assert relative_error(draw(again, **settings), draw(model, **settings)) < 1e-5


def kohya(
    network: str, module: torch.nn.Module, names: dict[str, str], generator: torch.Generator
) -> dict[str, Tensor]:
    """A LoRA of rank 3 for every attention layer, in kohya's spelling; ``names`` of blocks that differ from ours."""
    tensors = {}
    for name, layer in module.named_modules():
        if not isinstance(layer, torch.nn.Linear) or ("attn" not in name and "mlp" not in name):
            continue
        block = max((known for known in names if name.startswith(f"{known}.")), key=len, default="")
        spelt = names.get(block, "") + name.removeprefix(block)
        flat = f"{network}_{spelt.replace('.', '_')}"
        out, inner = layer.weight.shape
        tensors[f"{flat}.lora_down.weight"] = torch.randn(3, inner, generator=generator) / inner**0.5
        tensors[f"{flat}.lora_up.weight"] = torch.randn(out, 3, generator=generator) / 3**0.5
        tensors[f"{flat}.alpha"] = torch.tensor(1.5)
    return tensors


@pytest.mark.parametrize("make", [tiny_models.sd1, tiny_models.sdxl], ids=["sd1", "sdxl"])
def test_a_lora_changes_the_picture_as_diffusers_does(make: Any, tmp_path: Path) -> None:
    """kohya's names; in SDXL the U-Net's blocks are called as in the original code, which counts them through."""
    pipeline = make()
    folder = tiny_models.save(pipeline, tmp_path / "folder")
    random = torch.Generator().manual_seed(1)
    if hasattr(pipeline, "text_encoder_2"):
        blocks = unet_modules(read_unet_config(folder / "unet/config.json"))
        tensors = kohya("lora_unet", pipeline.unet, blocks, random)
        tensors |= kohya("lora_te1_text_model", pipeline.text_encoder, {}, random)
        tensors |= kohya("lora_te2", pipeline.text_encoder_2, {}, random)
        assert any("input_blocks" in key for key in tensors)
    else:
        tensors = kohya("lora_unet", pipeline.unet, {}, random)
        tensors |= kohya("lora_te_text_model", pipeline.text_encoder, {}, random)
    safetensors.torch.save_file(tensors, tmp_path / "style.safetensors")
    pipeline.load_lora_weights(tmp_path, weight_name="style.safetensors")
    pipeline.fuse_lora(lora_scale=0.6)
    pair = Pair(pipeline, folder)
    ours = LatentDiffusion.from_pretrained(folder, adaptations=[Lora(tmp_path / "style.safetensors", 0.6)])
    assert_same(draw(ours), run(pipeline))
    assert relative_error(pair.ours(), draw(ours)) > 1e-2


def test_a_learnt_word_changes_the_picture_as_diffusers_does(tmp_path: Path) -> None:
    pipeline = tiny_models.sd1()
    folder = tiny_models.save(pipeline, tmp_path / "folder")
    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(1)) / 8
    safetensors.torch.save_file({"<toy>": vectors}, tmp_path / "toy.safetensors")
    pipeline.load_textual_inversion(tmp_path / "toy.safetensors", token="<toy>")
    prompts = ["a red <toy>", "<toy> above a blue square"]
    ours = LatentDiffusion.from_pretrained(folder, adaptations=[TextualInversion(tmp_path / "toy.safetensors")])
    assert_same(draw(ours, prompts), run(pipeline, prompts))
    assert relative_error(Pair(pipeline, folder).ours(prompts), draw(ours, prompts)) > 1e-2
    for save in (ours.save_pretrained, ours.save_single_file):
        with pytest.raises(ModelError, match="textual inversions can't be saved"):
            save(tmp_path / "again")


def test_a_word_for_both_encoders_changes_the_picture_as_diffusers_does(tmp_path: Path) -> None:
    """The pooled text comes from the end of the prompt, which has a smaller id than a learnt word."""
    pipeline = tiny_models.sdxl()
    folder = tiny_models.save(pipeline, tmp_path / "folder")
    random = torch.Generator().manual_seed(1)
    vectors = {"clip_l": torch.randn(2, 32, generator=random) / 8, "clip_g": torch.randn(2, 48, generator=random) / 8}
    safetensors.torch.save_file(vectors, tmp_path / "y2k.safetensors")
    for name, encoder, tokenizer in (
        ("clip_l", pipeline.text_encoder, pipeline.tokenizer),
        ("clip_g", pipeline.text_encoder_2, pipeline.tokenizer_2),
    ):
        pipeline.load_textual_inversion(vectors[name], token="y2k", text_encoder=encoder, tokenizer=tokenizer)
    prompts = ["a red y2k", "y2k above a blue square"]
    ours = LatentDiffusion.from_pretrained(folder, adaptations=[TextualInversion(tmp_path / "y2k.safetensors")])
    assert_same(draw(ours, prompts), run(pipeline, prompts))
    assert relative_error(Pair(pipeline, folder).ours(prompts), draw(ours, prompts)) > 1e-2
