"""Jobs on models and pictures of all kinds, by the command line: what they start from, where the model lies."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from PIL import Image

from sdbatch.diffusion import LatentDiffusion, open_checkpoint
from sdbatch.engine.models.loading import bring, find_model
from sdbatch.spec import LearntWord, Model
from sdbatch.storage import open_store
from tests.conftest import CommandLine
from tests.diffusion import tiny_models

Write = Callable[..., Path]


def write_table(folder: Path, rows: list[dict[str, Any]]) -> None:
    with (folder / "prompts.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def pictures(folder: Path) -> dict[str, np.ndarray]:
    rows = pq.read_table(folder / "metadata").to_pylist()
    made = [row for row in rows if row["status"] == "committed"]
    return {row["image_id"]: np.asarray(Image.open(folder / row["path"])) for row in made}


def test_pictures_are_changed_repainted_and_bad_ones_quarantined(
    sdbatch: CommandLine, write_job: Write, tmp_path: Path
) -> None:
    model = LatentDiffusion.from_pretrained("builtin:shapes")
    photo = model.generate(["a large blue square on a cream background"], seeds=[3])[0]
    Image.fromarray(photo).resize((80, 60)).save(tmp_path / "photo.png")
    left = np.zeros((64, 64), np.uint8)
    left[:, :32] = 255
    Image.fromarray(left).save(tmp_path / "left.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    deep = np.full((60, 80), 1000, np.uint16)
    Image.fromarray(deep).save(tmp_path / "dark-in-16-bits.png")
    write_table(
        tmp_path,
        [
            {"prompt": "a red circle", "init": "photo.png", "mask": "", "much": "0.4"},
            {"prompt": "a red circle", "init": str(tmp_path / "photo.png"), "mask": "left.png", "much": ""},
            {"prompt": "a red circle", "init": "broken.png", "mask": "", "much": "0.4"},
            {"prompt": "a red circle", "init": "missing.png", "mask": "", "much": "0.4"},
            {"prompt": "a red circle", "init": "bomb.png", "mask": "", "much": "0.4"},
            {"prompt": "a red circle", "init": "prompts.csv", "mask": "", "much": "0.4"},
            {"prompt": "a red circle", "init": "", "mask": "left.png", "much": ""},
            {"prompt": "a red circle", "init": "photo.png", "mask": "", "much": "0.1"},
            {"prompt": "a red circle", "init": "photo.png", "mask": "", "much": "7"},
            {"prompt": "a red circle", "init": "", "mask": "", "much": "0.1"},
            {"prompt": "a red circle", "init": "/dev/zero", "mask": "", "much": ""},
            {"prompt": "a red circle", "init": "photo.png", "mask": "dark-in-16-bits.png", "much": ""},
        ],
    )
    columns = {"init_image": "init", "mask_image": "mask", "strength": "much"}
    job = write_job(input={"columns": columns}, generate={"num_inference_steps": 5, "strength": 1.0})
    sdbatch("run", job, "--set", "failures.max_failed_fraction=1", code=3)
    assert sdbatch.json("verify", "out")["ok"]
    errors = {failure["image_id"]: failure["error"] for failure in sdbatch.json("errors", "out")}
    assert "broken.png is no PNG, JPEG or WebP picture that can be read" in errors["00000002-0"]
    assert "missing.png does not exist" in errors["00000003-0"]
    assert "bomb.png has" in errors["00000004-0"]
    assert "prompts.csv is no PNG" in errors["00000005-0"]
    assert errors["00000006-0"] == "row 7: mask_image is given without an init_image to repaint"
    assert "strength 0.1 of 5 steps leaves no step to take" in errors["00000007-0"]
    assert "strength is '7'" in errors["00000008-0"]
    made = pictures(tmp_path / "out")
    assert sorted(made) == ["00000000-0", "00000001-0", "00000009-0", "00000011-0"]
    assert "/dev/zero is no file" in errors["00000010-0"]

    # The right half was to be kept, and is the picture's own.
    resized = np.asarray(Image.open(tmp_path / "photo.png").resize((64, 64), Image.Resampling.LANCZOS))
    kept = made["00000001-0"][:, 40:].astype(int) - resized[:, 40:]
    new = made["00000001-0"][:, :24].astype(int) - resized[:, :24]
    assert not kept.any()
    assert abs(new).mean() > 10
    assert np.array_equal(made["00000011-0"], resized)  # a dark mask paints nothing
    # The job's picture is the model's own, in the same place of a batch of the same size.
    alone = model.generate(
        ["a red circle", "", "", ""],
        seeds=[pq.read_table(tmp_path / "out/metadata").to_pylist()[0]["seed"], 0, 0, 0],
        num_inference_steps=5,
        sampler="dpmpp_2m",
        init_images=np.stack([resized, *[np.zeros_like(resized)] * 3]),
        strength=0.4,
    )
    assert np.array_equal(alone[0], made["00000000-0"])
    row = pq.read_table(tmp_path / "out/metadata").to_pylist()[0]
    assert (row["init_image"], row["mask_image"], row["strength"]) == ("photo.png", None, 0.4)


def test_long_prompts_are_cut_and_said_so_or_read_in_chunks(
    sdbatch: CommandLine, write_job: Write, tmp_path: Path
) -> None:
    long = "a red circle on a white background, " * 10 + "and a blue square"
    write_table(tmp_path, [{"prompt": "a red circle"}, {"prompt": long}, {"prompt": "a blue ring"}])
    sdbatch("run", write_job())
    rows = pq.read_table(tmp_path / "out/metadata").to_pylist()
    assert [row["truncated"] for row in rows] == [False, True, False]
    whole = write_job(output={"uri": str(tmp_path / "whole")}, generate={"long_prompts": "chunk"})
    assert sdbatch.json("plan", whole)["shards"] == 2  # prompts of one length in one shard
    sdbatch("run", whole)
    assert not any(row["truncated"] for row in pq.read_table(tmp_path / "whole/metadata").to_pylist())
    cut, read = pictures(tmp_path / "out"), pictures(tmp_path / "whole")
    assert np.array_equal(cut["00000000-0"], read["00000000-0"])
    assert not np.array_equal(cut["00000001-0"], read["00000001-0"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model in a folder of its own."""
    folder = tmp_path_factory.mktemp("model") / "copy"
    LatentDiffusion.from_pretrained("builtin:shapes").save_pretrained(folder, dtype="float16")
    return folder


def test_models_loras_and_embeddings_are_found_in_folders_and_in_s3(
    sdbatch: CommandLine, write_job: Write, tmp_path: Path, folder: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store = open_store(f"s3://{bucket}/models")
    for path in folder.rglob("*"):
        if path.is_file():
            store.put(f"copy/{path.relative_to(folder)}", path.read_bytes())
    down, up = torch.randn(2, 128), torch.randn(128, 2)
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
    lora = tmp_path / "l.safetensors"
    safetensors.torch.save_file({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}, lora)
    safetensors.torch.save_file({"emb_params": torch.randn(2, 128)}, tmp_path / "mauve.safetensors")
    store.put("l.safetensors", lora.read_bytes())
    write_table(tmp_path, [{"prompt": "a mauve circle"}])

    def job(name: str, **model: Any) -> np.ndarray:
        sdbatch("run", write_job(output={"uri": str(tmp_path / name)}, model=model))
        return pictures(tmp_path / name)["00000000-0"]

    built_in = job("builtin", uri="builtin:shapes")
    assert np.array_equal(job("folder", uri=str(folder)), built_in)
    assert np.array_equal(job("s3", uri=f"s3://{bucket}/models/copy"), built_in)
    adapted = job("lora", uri=str(folder), loras=[{"uri": str(lora), "weight": 2.0}])
    assert not np.array_equal(adapted, built_in)
    remote = job("lora-s3", uri=str(folder), loras=[{"uri": f"s3://{bucket}/models/l.safetensors", "weight": 2.0}])
    assert np.array_equal(adapted, remote)
    taught = job("word", uri=str(folder), embeddings=[{"uri": str(tmp_path / "mauve.safetensors")}])
    assert not np.array_equal(taught, built_in)
    # A changed LoRA is another model: what was planned with the old one is not mixed with it.
    safetensors.torch.save_file({f"{layer}.lora_A.weight": -down, f"{layer}.lora_B.weight": up}, lora)
    told = sdbatch(
        "run",
        write_job(
            output={"uri": str(tmp_path / "lora")},
            model={"uri": str(folder), "loras": [{"uri": str(lora), "weight": 2.0}]},
        ),
        code=2,
    ).stderr
    assert "model: sha256" in told
    # Fetched once: what is in the cache is not fetched again.
    fetched = [path for path in (tmp_path / "cache").rglob("*.safetensors") if not path.is_symlink()]
    before = {path: path.stat().st_mtime_ns for path in fetched}
    again = bring(f"s3://{bucket}/models/copy")
    assert open_checkpoint(again).family == "latent diffusion"
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())


@pytest.mark.filterwarnings("ignore")
def test_a_single_file_needs_a_tokenizer_and_may_be_called_otherwise_later(
    sdbatch: CommandLine, write_job: Write, tmp_path: Path
) -> None:
    tiny_models.sdxl().save_pretrained(tmp_path / "sdxl")
    file = tmp_path / "sdxl.safetensors"
    LatentDiffusion.from_pretrained(tmp_path / "sdxl").save_single_file(file)
    write_table(tmp_path, [{"prompt": "a red circle"}, {"prompt": "a blue ring"}])
    told = sdbatch("run", write_job(model={"uri": str(file)}), code=2).stderr
    assert "brings no tokenizer: set model.tokenizer" in told
    tokenizer = str(tmp_path / "sdxl/tokenizer")
    size = {"width": 64, "height": 64}  # a file does not say at which size this one is at home
    sdbatch("plan", write_job(model={"uri": str(file), "tokenizer": tokenizer}, generate=size))
    file.rename(tmp_path / "renamed.safetensors")
    renamed = {"uri": str(tmp_path / "renamed.safetensors"), "tokenizer": tokenizer}
    sdbatch("run", write_job(model=renamed, generate=size))
    folder = {"uri": str(tmp_path / "folder")}
    sdbatch("run", write_job(output=folder, model={"uri": str(tmp_path / "sdxl")}, generate=size))
    one, other = pictures(tmp_path / "out"), pictures(tmp_path / "folder")
    assert sorted(one) == sorted(other) == ["00000000-0", "00000001-0"]
    # Weights that lie elsewhere in their file are aligned in another way, which some CPUs' kernels round by.
    assert all(np.abs(one[name].astype(int) - other[name]).max() <= 1 for name in one)
    assert sdbatch.json("inspect", tmp_path / "renamed.safetensors", "--tokenizer", tokenizer)["family"] == "SDXL"


@pytest.mark.filterwarnings("ignore")
def test_an_inpainting_model_wants_a_mask_in_every_row(sdbatch: CommandLine, write_job: Write, tmp_path: Path) -> None:
    tiny_models.sd1(in_channels=9).save_pretrained(tmp_path / "inpainting")
    Image.new("RGB", (64, 64), (200, 180, 160)).save(tmp_path / "photo.png")
    Image.new("L", (64, 64), 255).save(tmp_path / "all.png")
    write_table(
        tmp_path,
        [
            {"prompt": "a red circle", "init_image": "photo.png", "mask_image": "all.png"},
            {"prompt": "a red circle", "init_image": "photo.png", "mask_image": ""},
        ],
    )
    columns = {"init_image": "init_image", "mask_image": "mask_image"}
    job = write_job(input={"columns": columns}, model={"uri": str(tmp_path / "inpainting")})
    assert sdbatch.json("run", job, code=3)["committed"] == 1
    (failure,) = sdbatch.json("errors", "out")
    assert "an inpainting model needs init_image and mask_image" in failure["error"]


def test_mistakes_about_models_end_before_anything_starts(
    sdbatch: CommandLine, write_job: Write, tmp_path: Path, folder: Path, bucket: str
) -> None:
    write_table(tmp_path, [{"prompt": "a red circle"}])
    (tmp_path / "l.safetensors").write_bytes(b"{}")
    for model, told in (
        ({"uri": str(tmp_path / "sd.ckpt")}, "is a pickle, which can run code when opened; convert it"),
        ({"uri": str(tmp_path / "sd.safetensors")}, "does not exist"),
        ({"uri": f"s3://{bucket}/nothing"}, "does not exist, or holds nothing"),
        ({"uri": "hf:only-a-name"}, "should be hf:OWNER/NAME"),
        ({"loras": [{"uri": str(tmp_path / "l.safetensors")}]}, "l.safetensors"),
        ({"embeddings": [{"uri": str(tmp_path / "e.pt")}]}, "pickle"),
        ({"uri": "~nobody-of-this-name/model"}, "nobody-of-this-name"),
        ({"prediction_type": "x"}, "model.prediction_type"),
        ({"loras": [{"url": "x"}]}, "model.loras.0.url: no such field"),
    ):
        assert told in sdbatch("run", write_job(model=model), code=2).stderr
        assert not (tmp_path / "out/_sdbatch/job.yaml").exists()


def test_the_checksum_covers_what_a_word_is_called(tmp_path: Path) -> None:
    vectors = {"emb_params": torch.randn(2, 128)}
    for name in ("mauve", "taupe"):
        safetensors.torch.save_file(vectors, tmp_path / f"{name}.safetensors")

    def checksum(name: str, token: str | None = None) -> str:
        return find_model(Model(embeddings=[LearntWord(uri=str(tmp_path / f"{name}.safetensors"), token=token)])).sha256

    assert checksum("mauve") != checksum("taupe")
    assert checksum("mauve", "shade") == checksum("taupe", "shade")


def test_inspect_tells_what_a_model_is_and_what_it_lacks(sdbatch: CommandLine, folder: Path, tmp_path: Path) -> None:
    found = sdbatch.json("inspect", folder)
    assert (found["family"], found["layout"], found["prediction_type"]) == (
        "latent diffusion",
        "diffusers folder",
        "v_prediction",
    )
    assert [network["name"] for network in found["networks"]] == ["unet", "vae", "text_encoder"]
    assert found["networks"][0]["stored_as"] == ["F16"]
    assert found["problems"] == []
    assert "every weight is there" in sdbatch("inspect", folder).stderr
    damaged = tmp_path / "damaged"
    LatentDiffusion.from_pretrained(str(folder)).save_pretrained(damaged)
    weights = safetensors.torch.load_file(damaged / "vae/diffusion_pytorch_model.safetensors")
    del weights["quant_conv.bias"]
    safetensors.torch.save_file(weights, damaged / "vae/diffusion_pytorch_model.safetensors")
    told = sdbatch("inspect", damaged, code=2).stderr
    assert "lacks: quant_conv.bias" in told
