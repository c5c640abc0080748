"""CLIP against transformers: both encoders, the similarity, the preprocessing and the folder it saves."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from tokenizers import pre_tokenizers

from sdbatch.diffusion.clip import CLIP
from sdbatch.diffusion.image_encoder import ImageEncoderConfig, Preprocessing, preprocess
from sdbatch.diffusion.text_encoder import TextEncoderConfig
from sdbatch.diffusion.tokenizer import BOS, EOS
from sdbatch.errors import ModelError, UsageError

MERGES = ["r e", "re d</w>", "c i", "ci r", "cir c", "l e</w>", "circ le</w>"]
PROMPTS = ["a red circle", "", "a circle beside a red circle on a ground of a colour without a name", "日本 ✓ red?"]
LENGTH = 24

#: Sizes that differ from each other wherever they can. The numbers of heads are those of the reference's defaults.
TEXT = {
    "vocab_size": 530,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": LENGTH,
    "bos_token_id": 519,
    "eos_token_id": 520,
}
IMAGE = {"hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 12}
CONFIGS: dict[str, dict[str, Any]] = {
    "quick_gelu": {
        "text_config": {**TEXT, "hidden_act": "quick_gelu", "pad_token_id": 520},
        "vision_config": {**IMAGE, "hidden_act": "quick_gelu", "image_size": 32, "patch_size": 8},
        "projection_dim": 20,
    },
    "gelu": {
        "text_config": {**TEXT, "hidden_act": "gelu", "layer_norm_eps": 1e-3, "pad_token_id": 0},
        "vision_config": {**IMAGE, "hidden_act": "gelu", "image_size": 42, "patch_size": 14, "layer_norm_eps": 1e-4},
        "projection_dim": 36,
    },
}


@dataclass(frozen=True)
class Reference:
    """transformers' model, tokenizer and image processor, and the folder into which they saved themselves."""

    folder: Path
    model: transformers.CLIPModel
    tokenizer: transformers.CLIPTokenizer
    processor: transformers.CLIPImageProcessorPil

    def inputs(self, images: np.ndarray, prompts: list[str]) -> dict[str, torch.Tensor]:
        ids = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=LENGTH).input_ids
        pixels = self.processor(list(images), return_tensors="pt").pixel_values
        return {"input_ids": torch.tensor(ids), "pixel_values": pixels}


def save_reference(folder: Path, name: str) -> Reference:
    """A model of random weights and a vocabulary of single bytes and a few merges."""
    config = transformers.CLIPConfig(**CONFIGS[name])
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for weight in model.parameters():  # also of the norms and biases, which start as ones and zeros
            weight.add_(torch.randn_like(weight), alpha=0.1)
    chars = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*chars, *(char + "</w>" for char in chars), *(merge.replace(" ", "") for merge in MERGES), BOS, EOS]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n")
    pad = {520: EOS, 0: tokens[0]}[config.text_config.pad_token_id]
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, pad_token=pad)
    size = config.vision_config.image_size
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").unlink()
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    return Reference(folder, model, tokenizer, processor)


@pytest.fixture(scope="module", params=CONFIGS)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return save_reference(tmp_path_factory.mktemp("clip") / request.param, request.param)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder to break."""
    return save_reference(tmp_path / "clip", "quick_gelu").folder


def pictures(count: int = 4, height: int = 57, width: int = 83) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def change_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change_weights(folder: Path, **changed: torch.Tensor | None) -> None:
    weights = {**safetensors.torch.load_file(folder / "model.safetensors"), **changed}
    kept = {key: value for key, value in weights.items() if value is not None}
    safetensors.torch.save_file(kept, folder / "model.safetensors")


def test_both_encoders_compute_what_transformers_computes(reference: Reference) -> None:
    ours = CLIP.from_pretrained(reference.folder)
    inputs = reference.inputs(pictures(), PROMPTS)
    with torch.no_grad():
        image = reference.model.get_image_features(inputs["pixel_values"])
        text = reference.model.get_text_features(inputs["input_ids"])
        states, pooled = ours.vision_model(inputs["pixel_values"])
        assert relative_error(states, image.last_hidden_state) <= 1e-4
        assert relative_error(ours.visual_projection(pooled), image.pooler_output) <= 1e-4
    assert relative_error(ours.embed_images(pictures()), F.normalize(image.pooler_output, dim=-1)) <= 1e-4
    assert relative_error(ours.embed_texts(PROMPTS), F.normalize(text.pooler_output, dim=-1)) <= 1e-4


def test_score_is_the_cosine_of_each_picture_with_its_own_prompt(reference: Reference) -> None:
    ours = CLIP.from_pretrained(reference.folder)
    with torch.no_grad():
        theirs = reference.model(**reference.inputs(pictures(), PROMPTS))
    assert ours.logit_scale == reference.model.logit_scale
    score = ours.score(pictures(), PROMPTS)
    assert score.shape == (4,)
    assert relative_error(score, theirs.logits_per_image.diag() / reference.model.logit_scale.detach().exp()) <= 1e-4


@pytest.mark.parametrize("shape", [(57, 83), (83, 57), (32, 32), (11, 20), (201, 50)])
def test_preprocessing_gives_the_pixels_that_transformers_gives(shape: tuple[int, int]) -> None:
    images = pictures(2, *shape)
    theirs = transformers.CLIPImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 33, "width": 33})
    expected = theirs(list(images), return_tensors="np").pixel_values
    ours = preprocess(images, Preprocessing(shortest_edge=36, crop_size=33))
    assert ours.dtype == expected.dtype
    np.testing.assert_array_equal(ours, expected)


def test_embeddings_are_unit_vectors_in_float32_whatever_the_dtype(reference: Reference) -> None:
    exact, half = (CLIP.from_pretrained(reference.folder, dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert half.vision_model.post_layernorm.weight.dtype == torch.bfloat16
    for embed, given in (("embed_images", pictures()), ("embed_texts", PROMPTS)):
        vectors = getattr(half, embed)(given)
        assert vectors.dtype == torch.float32
        assert torch.allclose(vectors.norm(dim=-1), torch.ones(4))
        assert relative_error(vectors, getattr(exact, embed)(given)) <= 0.05


def test_what_a_config_leaves_out_is_as_in_the_reference(reference: Reference, tmp_path: Path) -> None:
    """Published folders hold only what differs from ViT-B/32, and older ones a second copy of the sizes."""
    before = CLIP.from_pretrained(reference.folder)
    for path in reference.folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config.json").unlink()
    defaults = {"text_config": transformers.CLIPTextConfig(), "vision_config": transformers.CLIPVisionConfig()}
    sparse: dict[str, Any] = {"projection_dim": reference.model.projection_dim}
    for half, default in defaults.items():
        sizes = getattr(reference.model.config, half).to_dict()
        sparse[half] = {key: value for key, value in sizes.items() if value != getattr(default, key, None)}
        assert "num_attention_heads" not in sparse[half]
    sparse |= {"text_config_dict": sparse["text_config"], "text_config": {"hidden_size": 7}, "vision_config_dict": None}
    (tmp_path / "config.json").write_text(json.dumps(sparse))
    after = CLIP.from_pretrained(tmp_path)
    assert torch.equal(after.score(pictures(), PROMPTS), before.score(pictures(), PROMPTS))


def test_a_processor_that_transformers_saves_in_one_piece_is_read(tmp_path: Path) -> None:
    saved = save_reference(tmp_path / "clip", "quick_gelu")
    own = CLIP.from_pretrained(saved.folder).preprocessing
    (saved.folder / "preprocessor_config.json").unlink()
    assert CLIP.from_pretrained(saved.folder).preprocessing == own  # CLIP's, at the size of the encoder
    saved.processor.image_mean = [0.1, 0.2, 0.3]
    transformers.CLIPProcessor(saved.processor, saved.tokenizer).save_pretrained(saved.folder)
    assert (saved.folder / "processor_config.json").is_file()
    assert CLIP.from_pretrained(saved.folder).preprocessing == dataclasses.replace(own, mean=(0.1, 0.2, 0.3))


def test_counted_positions_of_older_releases_are_ignored(folder: Path) -> None:
    before = CLIP.from_pretrained(folder).score(pictures(), PROMPTS)
    positions = {f"{half}.embeddings.position_ids": torch.arange(5)[None] for half in ("text_model", "vision_model")}
    change_weights(folder, **positions)
    assert torch.equal(CLIP.from_pretrained(folder).score(pictures(), PROMPTS), before)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"vision_model.pre_layrnorm.bias": None}, r"lacks: vision_model\.pre_layrnorm\.bias$"),
        ({"vision_model.head.weight": torch.zeros(3)}, r"has unknown: vision_model\.head\.weight$"),
        ({"text_projection.weight": torch.zeros(3)}, r"text_projection\.weight is \(3,\) but should be \(20, 32\)$"),
    ],
)
def test_weights_that_do_not_fit_are_named_with_their_file(changed: dict, told: str, folder: Path) -> None:
    change_weights(folder, **changed)
    with pytest.raises(ModelError, match=r"clip/model\.safetensors: .*" + told):
        CLIP.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "fields", "told"),
    [
        ("config.json", {"vision_config": {"hidden_act": "relu"}}, "vision_config: hidden_act 'relu'"),
        ("config.json", {"text_config": {"vocab_size": 9}}, "ids go up to 520, vocab_size is 9"),
        ("preprocessor_config.json", {"crop_size": 30}, "of 32 pixels not supported: crop_size"),
        ("preprocessor_config.json", {"size": {"height": 32, "width": 32}}, "not supported: size"),
        ("preprocessor_config.json", {"resample": 2}, "not supported: resample 2"),
        ("preprocessor_config.json", {"do_normalize": False}, "not supported: do_normalize False"),
    ],
)
def test_what_is_not_done_here_is_refused(name: str, fields: dict, told: str, folder: Path) -> None:
    change_json(folder / name, **fields)
    with pytest.raises(ModelError, match=told):
        CLIP.from_pretrained(folder)


def test_weights_in_several_files_and_in_half_precision_are_read(folder: Path) -> None:
    whole, before = folder / "model.safetensors", CLIP.from_pretrained(folder).score(pictures(), PROMPTS)
    weights = safetensors.torch.load_file(whole)
    whole.unlink()
    halves = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    for place, (key, value) in enumerate(sorted(weights.items())):
        list(halves.values())[place % 2][key] = value
    for name, part in halves.items():
        safetensors.torch.save_file(part, folder / name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: name for name, part in halves.items() for key in part}}))
    assert torch.equal(CLIP.from_pretrained(folder).score(pictures(), PROMPTS), before)
    index.unlink()
    safetensors.torch.save_file({k: v.half() for k, v in weights.items()}, folder / "model.fp16.safetensors")
    assert torch.allclose(CLIP.from_pretrained(folder).score(pictures(), PROMPTS), before, atol=0.01)


def test_missing_files_are_named(folder: Path) -> None:
    with pytest.raises(ModelError, match="dtype 'int8' is not known"):
        CLIP.from_pretrained(folder, dtype="int8")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors is missing"):
        CLIP.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json can't be read"):
        CLIP.from_pretrained(folder)


def test_bad_arguments_are_named(folder: Path) -> None:
    ours = CLIP.from_pretrained(folder)
    with pytest.raises(UsageError, match="4 images for 1 prompts"):
        ours.score(pictures(), ["a red circle"])
    with pytest.raises(UsageError, match=r"images are float64 of shape \(2, 8, 8, 3\)"):
        ours.embed_images(np.zeros((2, 8, 8, 3)))


def test_full_size_has_the_reference_key_names_and_shapes(folder: Path) -> None:
    tokenizer = CLIP.from_pretrained(folder).tokenizer
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    image = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    config = transformers.CLIPConfig(text_config=text, vision_config={**image, "patch_size": 14}, projection_dim=768)
    with torch.device("meta"):
        ours = CLIP(tokenizer, TextEncoderConfig(), ImageEncoderConfig(), 768, Preprocessing())
        theirs = transformers.CLIPModel(config)
    shapes = {key: tuple(value.shape) for key, value in ours.state_dict().items()}
    assert shapes == {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    # A count that the published ViT-L/14 checkpoint is known by.
    assert sum(value.numel() for value in ours.parameters()) == 427_616_513
