"""The safety checker against diffusers', with random weights: scores, verdicts, and the folders it is found in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

from sdbatch.checks import FoundChecks, find_checks, load_measures
from sdbatch.diffusion.clip_folder import read_clip_folder
from sdbatch.diffusion.safety_checker import SafetyChecker, safety_component
from sdbatch.errors import ModelError
from sdbatch.spec import Checks
from tests.diffusion.test_clip import CONFIGS, pictures


class Reference:
    """A safety checker of random weights in a diffusers folder. Some of the pictures are unsafe, most of these only
    because they come near a concept of special care."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root / "safety_checker"
        torch.manual_seed(3)
        self.model = StableDiffusionSafetyChecker(transformers.CLIPConfig(**CONFIGS["quick_gelu"])).eval()
        self.processor = transformers.CLIPImageProcessorPil(
            size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6]
        )
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                if not name.endswith("_weights"):
                    weight.copy_(torch.randn_like(weight) * (0.3 if weight.ndim > 1 else 0.1))
            self.cosines = self._cosines(self.model.concept_embeds)
            self.model.concept_embeds_weights.copy_(self.cosines.amax(dim=0) + 0.009)
            self.model.concept_embeds_weights[0] = self.cosines[:, 0].amax() - 1e-3
            special = self._cosines(self.model.special_care_embeds)
            self.model.special_care_embeds_weights.copy_(special.median(dim=0).values + 6e-3)
        self.model.save_pretrained(self.folder)
        (root / "feature_extractor").mkdir()
        self.processor.save_pretrained(root / "feature_extractor")

    def inputs(self) -> torch.Tensor:
        return self.processor(list(images()), return_tensors="pt").pixel_values

    def _cosines(self, concepts: torch.Tensor) -> torch.Tensor:
        vectors = self.model.visual_projection(self.model.vision_model(self.inputs())[1])
        return torch.nn.functional.normalize(vectors) @ torch.nn.functional.normalize(concepts).T


def images() -> np.ndarray:
    return pictures(12)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(tmp_path_factory.mktemp("sd"))


def classifier(uri: Path, **concepts: float) -> tuple[FoundChecks, Any]:
    spec = Checks.model_validate({"safety": {"model": str(uri), "concepts": concepts}})
    return find_checks(spec), load_measures(spec, "cpu", 1, emphasis=False)


def test_it_finds_unsafe_what_the_reference_finds_unsafe(reference: Reference) -> None:
    blackened, unsafe = reference.model(reference.inputs(), [np.ones((4, 4, 3)) for _ in range(12)])
    assert 0 < sum(unsafe) < 12
    found, measures = classifier(reference.folder)
    facts = measures(images(), [""] * 12)
    assert [one.unsafe_score > 0 for one in facts] == unsafe == [not picture.any() for picture in blackened]
    ours: SafetyChecker = safety_component(read_clip_folder(reference.folder)).load("cpu", torch.float32)
    beyond = ours.beyond(images())
    plain = reference.cosines - reference.model.concept_embeds_weights
    stricter = (beyond - plain > 0.005).any(dim=1)
    assert 0 < stricter.sum() < 12  # some come near a concept of special care, others don't
    assert torch.allclose(beyond, plain + 0.01 * stricter[:, None], atol=1e-3)
    for one, row in zip(facts, beyond, strict=True):
        assert one.unsafe_concept == f"concept {int(row.argmax())}"
    assert found.sha256["safety"] == classifier(reference.root)[0].sha256["safety"]  # the folder of the whole model


def test_published_key_names_are_understood(reference: Reference, tmp_path: Path) -> None:
    """The image encoder is wrapped once more in them, and has a buffer of positions."""
    folder = tmp_path / "safety_checker"
    folder.mkdir()
    weights = safetensors.torch.load_file(reference.folder / "model.safetensors")
    weights = {key.replace("vision_model.", "vision_model.vision_model.", 1): value for key, value in weights.items()}
    weights["vision_model.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_bytes((reference.folder / "config.json").read_bytes())
    (tmp_path / "feature_extractor").symlink_to(reference.root / "feature_extractor")
    assert classifier(folder)[1](images(), [""] * 12) == classifier(reference.folder)[1](images(), [""] * 12)


def test_checkers_and_clips_are_told_apart(reference: Reference) -> None:
    with pytest.raises(ModelError, match=r"checks\.safety\.model: .* has concepts of its own"):
        classifier(reference.folder, nudity=0.2)
    with pytest.raises(ModelError, match=r"checks\.clip_score\.model: .* is a safety checker, which reads no prompts"):
        find_checks(Checks.model_validate({"clip_score": {"model": str(reference.folder)}}))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"vision_config": 7}, "config.json: not understood"),
        ({"vision_config": {"image_size": 0}}, "not understood: image_size is 0"),
        ({"vision_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers is 1000000000"),
        ({"projection_dim": "wide"}, "projection_dim is 'wide'"),
        ({"projection_dim": 21}, "misshapen"),
    ],
)
def test_a_forged_config_is_refused(fields: dict, told: str, reference: Reference, tmp_path: Path) -> None:
    raw = json.loads((reference.folder / "config.json").read_text())
    for name, value in fields.items():
        raw[name] = {**raw[name], **value} if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").symlink_to(reference.folder / "model.safetensors")
    with pytest.raises(ModelError, match=told):
        classifier(tmp_path)
