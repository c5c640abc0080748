"""Learnt embeddings against diffusers' loading of the same files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import diffusers
import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor

from sdbatch.diffusion.text_encoder import TextEncoder, TextEncoderConfig
from sdbatch.diffusion.textual_inversion import append_vectors, read_embedding
from sdbatch.errors import ModelError

TOKENIZER = Path(__file__).parents[2] / "sdbatch/models/shapes/tokenizer"


@pytest.fixture
def config() -> TextEncoderConfig:
    return TextEncoderConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=24
    )


def write(path: Path, tensors: dict[str, Tensor]) -> Path:
    safetensors.torch.save_file(tensors, path)
    return path


def vectors(count: int, width: int = 24) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(3))


LAYOUTS: dict[str, tuple[dict[str, Tensor], str]] = {
    "one vector": ({"<cat-toy>": vectors(1)[0]}, "<cat-toy>"),
    "one row": ({"<cat-toy>": vectors(1)}, "<cat-toy>"),
    "three vectors": ({"<cat-toy>": vectors(3)}, "<cat-toy>"),
    "web UI": ({"emb_params": vectors(3)}, "style"),
    "flattened pickle": ({"string_to_param.*": vectors(2)}, "style"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_token_means_what_it_means_to_diffusers(layout: str, config: TextEncoderConfig, tmp_path: Path) -> None:
    tensors, token = LAYOUTS[layout]
    path = write(tmp_path / "style.safetensors", tensors)
    torch.manual_seed(0)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(TOKENIZER)
    config = dataclasses.replace(config, vocab_size=len(tokenizer))
    theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(**dataclasses.asdict(config))).eval()
    ours = TextEncoder(config)
    ours.load_state_dict({f"text_model.{key.removeprefix('text_model.')}": v for key, v in theirs.state_dict().items()})
    pipeline = diffusers.StableDiffusionPipeline(
        vae=None,
        text_encoder=theirs,
        tokenizer=tokenizer,
        unet=None,
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    # diffusers takes a file's only key for the token; the web UIs' files are told their names by whoever loads them.
    pipeline.load_textual_inversion(tmp_path, weight_name=path.name, token=token)
    prompt = pipeline.maybe_convert_prompt(f"a red {token} circle", tokenizer)
    ids = tokenizer(prompt, padding="max_length", max_length=24, return_tensors="pt").input_ids

    embedding = read_embedding(path)
    assert embedding.token == token
    rows = embedding.vectors["text_encoder"]
    first = append_vectors(ours, rows)
    assert first == config.vocab_size
    assert [i for i in ids[0].tolist() if i >= first] == list(range(first, first + len(rows)))
    table = ours.text_model.embeddings.token_embedding
    assert torch.equal(table(ids), theirs.get_input_embeddings()(ids))


def test_sdxl_files_hold_vectors_for_both_encoders(tmp_path: Path) -> None:
    path = write(tmp_path / "y2k.safetensors", {"clip_g": vectors(2, 40).half(), "clip_l": vectors(2).half()})
    embedding = read_embedding(path)
    assert embedding.token == "y2k"
    assert {name: (rows.shape, rows.dtype) for name, rows in embedding.vectors.items()} == {
        "text_encoder": ((2, 24), torch.float32),
        "text_encoder_2": ((2, 40), torch.float32),
    }
    alone = read_embedding(write(tmp_path / "y2k.safetensors", {"clip_l": vectors(2)}))
    assert torch.equal(alone.vectors["text_encoder"], vectors(2))


def test_a_web_ui_file_may_tell_the_id_it_was_trained_for(tmp_path: Path) -> None:
    tensors = {"string_to_param.*": vectors(2), "string_to_token.*": torch.tensor(265)}
    embedding = read_embedding(write(tmp_path / "bad-hands.safetensors", tensors))
    assert embedding.token == "bad-hands"
    assert torch.equal(embedding.vectors["text_encoder"], vectors(2))


def test_rows_are_appended_in_the_encoders_own_type(config: TextEncoderConfig) -> None:
    encoder = TextEncoder(dataclasses.replace(config, vocab_size=50)).to(torch.bfloat16).requires_grad_(False)
    table = encoder.text_model.embeddings.token_embedding
    old = table.weight
    assert [append_vectors(encoder, vectors(3)), append_vectors(encoder, vectors(1))] == [50, 53]
    assert table.num_embeddings == len(table.weight) == 54
    assert table.weight.dtype == torch.bfloat16
    assert not table.weight.requires_grad
    assert torch.equal(table.weight, torch.cat([old, vectors(3).bfloat16(), vectors(1).bfloat16()]))


@pytest.mark.parametrize(
    ("width", "family"), [(768, "SD 1.x"), (1024, "SD 2.x"), (1280, "SDXL's second"), (7, "7 wide")]
)
def test_vectors_for_another_encoder_are_refused(width: int, family: str, config: TextEncoderConfig) -> None:
    encoder = TextEncoder(dataclasses.replace(config, vocab_size=50))
    with pytest.raises(ModelError, match=f"{width} wide.*24 wide") as error:
        append_vectors(encoder, vectors(2, width))
    assert family in str(error.value)
    assert encoder.text_model.embeddings.token_embedding.num_embeddings == 50


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "but has 0 keys"),
        ({f"<s{i}>": vectors(1) for i in range(5)}, "has 5 keys: <s0>, <s1>, <s2>, …"),
        ({"clip_l": vectors(1), "clip_g": vectors(1), "t5xxl": vectors(1)}, "has 3 keys"),
        ({"clip_l": vectors(1), "clip_g": vectors(2)}, "another number of vectors"),
        ({"<cat>": torch.zeros(1, 2, 24)}, r"no vectors under <cat>, but \(1, 2, 24\)"),
        ({"<cat>": torch.zeros(0, 24)}, "no vectors"),
        ({"<cat>": torch.zeros(24, dtype=torch.int64)}, r"no vectors under <cat>, but \(24,\) of torch\.int64"),
    ],
)
def test_files_of_no_known_layout_are_refused(tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "style.safetensors", tensors)
    with pytest.raises(ModelError, match=message) as error:
        read_embedding(path)
    assert str(path) in str(error.value)


def test_files_that_are_not_safetensors(tmp_path: Path) -> None:
    for name in ("style.pt", "learned_embeds.bin"):
        with pytest.raises(ModelError, match=rf"{name} is a pickle.*convert it to \.safetensors"):
            read_embedding(tmp_path / name)
    with pytest.raises(ModelError, match=r"missing\.safetensors can't be read"):
        read_embedding(tmp_path / "missing.safetensors")
