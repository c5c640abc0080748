"""Fine-tuning the built-in model on captioned pictures: resumed, as a LoRA and whole, read by jobs and by diffusers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdbatch.diffusion import LatentDiffusion, Lora
from sdbatch.errors import InputError, JobFailed, UsageError
from sdbatch.training import FineTuning, finetuning
from sdbatch.training.captions import caption
from sdbatch.training.loop import draws
from sdbatch.training.objective import Denoising
from sdbatch.training.world import draw, random_scene
from tests.diffusion import tiny_models

QUICK = FineTuning(rank=4, steps=4, batch=2, warmup=1, checkpoint_every=2, learning_rate=1e-2, sample_steps=1)
PROMPTS = ["a red circle on a white background", "a blue star above a green ring"]


def silent(stage: str, done: int, total: int, text: str) -> None:
    pass


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("pictures"), draws(0, "pictures")
    for number in range(6):
        scene = random_scene(rng)
        Image.fromarray(draw(scene, 80)[0]).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption(scene, rng))
    return folder


def made(model: LatentDiffusion) -> np.ndarray:
    images: np.ndarray = model.generate(PROMPTS, seeds=[1, 2], num_inference_steps=4)
    return images


def digests(folder: Path) -> Sequence[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*.safetensors"))]


@pytest.mark.parametrize("text_encoder", [False, True])
def test_a_lora_changes_pictures_and_resumes_to_the_same_file(
    text_encoder: bool, pictures: Path, tmp_path: Path
) -> None:
    recipe = FineTuning(**{**vars(QUICK), "text_encoder": text_encoder})

    class Stopped(Exception):
        pass

    def stop(stage: str, done: int, total: int, text: str) -> None:
        if (stage, done) == ("denoiser", 3):
            raise Stopped

    lora = finetuning.run(recipe, "builtin:shapes", pictures, tmp_path / "whole", silent)
    with pytest.raises(Stopped):
        finetuning.run(recipe, "builtin:shapes", pictures, tmp_path / "parts", stop)
    again = finetuning.run(recipe, "builtin:shapes", pictures, tmp_path / "parts", silent)
    assert digests(again.parent) == digests(lora.parent)
    assert (tmp_path / "whole/samples/0000004.png").is_file()

    tuned = LatentDiffusion.from_pretrained("builtin:shapes", adaptations=[Lora(lora, 1.0)])
    assert not np.array_equal(made(tuned), made(LatentDiffusion.from_pretrained("builtin:shapes")))


def test_diffusers_loads_the_lora_and_draws_the_same(pictures: Path, tmp_path: Path) -> None:
    import diffusers

    recipe = FineTuning(**{**vars(QUICK), "text_encoder": True})
    lora = finetuning.run(recipe, "builtin:shapes", pictures, tmp_path, silent)
    ours = LatentDiffusion.from_pretrained("builtin:shapes", adaptations=[Lora(lora, 1.0)])
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(
        ours.checkpoint.path, safety_checker=None, requires_safety_checker=False
    )
    theirs.set_progress_bar_config(disable=True)
    theirs.load_lora_weights(lora.parent)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    expected = theirs(PROMPTS, num_inference_steps=4, guidance_scale=5.0, generator=generators, output_type="np").images
    error = np.mean((made(ours) / 255 - expected) ** 2)
    assert 10 * np.log10(1 / error) > 45


def test_a_whole_model_learns_and_loads(pictures: Path, tmp_path: Path) -> None:
    recipe = FineTuning(**{**vars(QUICK), "full": True, "learning_rate": 1e-4, "resolution": 48})
    before = digests(LatentDiffusion.from_pretrained("builtin:shapes").checkpoint.path)
    folder = finetuning.run(recipe, "builtin:shapes", pictures, tmp_path, silent)
    tuned = LatentDiffusion.from_pretrained(folder)
    assert not np.array_equal(made(tuned), made(LatentDiffusion.from_pretrained("builtin:shapes")))
    assert digests(LatentDiffusion.from_pretrained("builtin:shapes").checkpoint.path) == before


@pytest.mark.parametrize("full", [False, True])
def test_sdxl_learns_with_both_its_text_encoders(full: bool, pictures: Path, tmp_path: Path) -> None:
    model = tiny_models.save(tiny_models.sdxl(), tmp_path / "sdxl")
    recipe = FineTuning(**{**vars(QUICK), "full": full, "text_encoder": True, "resolution": 64, "learning_rate": 1e-3})
    result = finetuning.run(recipe, str(model), pictures, tmp_path / "out", silent)
    adaptations = [] if full else [Lora(result, 1.0)]
    before = LatentDiffusion.from_pretrained(model)
    after = LatentDiffusion.from_pretrained(result if full else model, adaptations=adaptations)
    for old, new in zip(before.text_encoders, after.text_encoders, strict=True):
        assert any(not torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))


def test_dropped_captions_are_to_sdxl_what_guidance_gives_it(tmp_path: Path) -> None:
    model = LatentDiffusion.from_pretrained(tiny_models.save(tiny_models.sdxl(), tmp_path))
    assert model.checkpoint.zero_empty_prompt
    seen = []
    model.unet.register_forward_pre_hook(lambda module, given: seen.append(given[2:]))
    Denoising(model)(torch.zeros(2, 4, 8, 8), torch.tensor([1, 1]), ["", "a cat"])
    states, added = seen[0]
    assert not states[0].any()
    assert not added.pooled[0].any()
    assert states[1].any()


def test_state_of_other_pictures_or_settings_is_not_taken_up(pictures: Path, tmp_path: Path) -> None:
    finetuning.run(QUICK, "builtin:shapes", pictures, tmp_path, silent)
    with pytest.raises(UsageError, match="rank was 4, is 8"):
        finetuning.run(FineTuning(**{**vars(QUICK), "rank": 8}), "builtin:shapes", pictures, tmp_path, silent)
    others = tmp_path / "others"
    others.mkdir()
    for path in pictures.iterdir():
        (others / path.name).write_bytes(path.read_bytes())
    (others / "0.txt").write_text("something else")
    with pytest.raises(UsageError, match="holds another training: pictures was"):
        finetuning.run(QUICK, "builtin:shapes", others, tmp_path, silent)


def test_mistakes_are_told_before_anything_is_loaded(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="resolution is 50"):
        finetuning.run(FineTuning(resolution=50), "builtin:shapes", pictures, tmp_path, silent)
    with pytest.raises(UsageError, match="use fewer workers"):
        finetuning.run(FineTuning(workers=7), "builtin:shapes", pictures, tmp_path, silent)
    with pytest.raises(InputError, match="no-such"):
        finetuning.run(FineTuning(), "builtin:shapes", tmp_path / "no-such", tmp_path, silent)
    with pytest.raises(UsageError, match="lies within the pictures"):
        finetuning.run(FineTuning(), "builtin:shapes", pictures, pictures / "out", silent)
    assert not list(tmp_path.iterdir())


def test_a_gradient_that_is_not_finite_ends_the_training(pictures: Path, tmp_path: Path) -> None:
    recipe = FineTuning(**{**vars(QUICK), "learning_rate": 1e30})
    with pytest.raises(JobFailed, match="gradient of step 2 is not finite"):
        finetuning.run(recipe, "builtin:shapes", pictures, tmp_path, silent)
    assert not (tmp_path / "lora").exists()
