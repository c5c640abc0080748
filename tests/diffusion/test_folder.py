"""Folders in the diffusers layout: opened as diffusers and the world save them, saved as diffusers opens them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import safetensors.torch
import torch
from torch import Tensor

from sdbatch.diffusion import LatentDiffusion, open_checkpoint
from sdbatch.diffusion.configs import read_schedule
from sdbatch.diffusion.folder import read_folder, read_text_encoder, read_unet, read_vae
from sdbatch.diffusion.weights import Weights, write
from sdbatch.errors import ModelError
from tests.diffusion.families import SMALL, build_pipeline

pytestmark = pytest.mark.filterwarnings("ignore")  # the oracles warn of one another

Folder = Callable[[str], Path]
State = dict[str, Tensor]
PIPELINES = {
    "SD 1.x": diffusers.StableDiffusionPipeline,
    "SD 1.x inpainting": diffusers.StableDiffusionInpaintPipeline,
    "SD 2.x": diffusers.StableDiffusionPipeline,
    "SDXL": diffusers.StableDiffusionXLPipeline,
    "SDXL refiner": diffusers.StableDiffusionXLImg2ImgPipeline,
}


def states(pipeline: diffusers.DiffusionPipeline) -> dict[str, State]:
    """The weights of diffusers' networks, by our names."""
    found = {}
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        module = getattr(pipeline, part, None)
        if module is not None:
            state = module.state_dict()
            prefix = "" if part in ("unet", "vae") else "text_model."
            known = (prefix, "text_projection.")
            found[part] = {key if key.startswith(known) else prefix + key: state[key] for key in state}
    return found


def ours(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, State]:
    return {part.name: part.load("cpu", dtype).state_dict() for part in read_folder(folder).components}


def assert_equal(first: dict[str, State], second: dict[str, State]) -> None:
    assert first.keys() == second.keys()
    for part, state in first.items():
        assert state.keys() == second[part].keys()
        for key, value in state.items():
            assert torch.equal(value, second[part][key]), key


def copied(model: Path, new: Path) -> Path:
    """A folder that may be changed."""
    return Path(shutil.copytree(model, new))


def rewrite(path: Path, change: Callable[[State], object]) -> None:
    """Change the tensors of a file."""
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


def configure(path: Path, **settings: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


# -- diffusers' folders ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_we_open_what_diffusers_saves(name: str, model_folder: Folder) -> None:
    checkpoint = read_folder(model_folder(name))
    assert checkpoint.family == name
    assert (checkpoint.zero_empty_prompt, checkpoint.aesthetic_score) == (name == "SDXL", name == "SDXL refiner")
    pads = [tokenizer.pad_token for tokenizer in checkpoint.tokenizers]
    assert pads == ["!" if part.config.hidden_act == "gelu" else "<|endoftext|>" for part in checkpoint.text_encoders]
    assert_equal(ours(model_folder(name)), states(PIPELINES[name].from_pretrained(model_folder(name))))


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("name", ["SD 1.x", "SDXL"])
def test_we_open_weights_in_shards_and_in_half_precision(name: str, variant: str | None, tmp_path: Path) -> None:
    pipeline = build_pipeline(name, tmp_path / "spelling")
    if variant:
        pipeline = pipeline.to(torch.float16)
    pipeline.save_pretrained(tmp_path / "model", variant=variant, max_shard_size="2MB")
    assert len(list((tmp_path / "model/unet").glob("*-of-*.safetensors"))) > 1
    dtype = torch.float16 if variant else torch.float32
    assert_equal(ours(tmp_path / "model", dtype), states(pipeline))


def test_full_precision_is_preferred_where_both_are(model_folder: Folder, tmp_path: Path) -> None:
    unet = copied(model_folder("SD 1.x") / "unet", tmp_path / "unet")
    shutil.copy(unet / "diffusion_pytorch_model.safetensors", unet / "diffusion_pytorch_model.fp16.safetensors")
    assert [file.name for file in read_unet(unet).weights.files] == ["diffusion_pytorch_model.safetensors"]
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    assert [file.name for file in read_unet(unet).weights.files] == ["diffusion_pytorch_model.fp16.safetensors"]


# -- our folders -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_diffusers_opens_what_we_save(name: str, model_folder: Folder, tmp_path: Path) -> None:
    model = LatentDiffusion.from_pretrained(model_folder(name))
    model.save_pretrained(tmp_path)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(pipeline) is PIPELINES[name]
    before = PIPELINES[name].from_pretrained(model_folder(name))
    assert_equal(states(pipeline), states(before))
    for part in ("unet", "vae", "scheduler"):
        saved, original = dict(getattr(pipeline, part).config), dict(getattr(before, part).config)
        # Heads and transformer blocks are said for every level; upcast_attention is of no account to fused attention.
        otherwise = {"attention_head_dim", "transformer_layers_per_block", "upcast_attention"}
        for field in {field for field in saved if not field.startswith("_")} - otherwise:
            assert saved[field] == original[field], (part, field)
    checkpoint, again = read_folder(model_folder(name)), read_folder(tmp_path)
    assert [part.config for part in again.components] == [part.config for part in checkpoint.components]
    assert again.schedule == checkpoint.schedule


def test_a_model_can_be_saved_over_the_files_it_was_loaded_from(model_folder: Folder, tmp_path: Path) -> None:
    folder = copied(model_folder("SD 1.x"), tmp_path / "model")
    before = ours(model_folder("SD 1.x"))
    LatentDiffusion.from_pretrained(folder).save_pretrained(folder)
    assert_equal(ours(folder), before)


# -- folders of the world --------------------------------------------------------------------------------


def test_attention_names_of_early_releases_are_understood(model_folder: Folder, tmp_path: Path) -> None:
    vae = copied(model_folder("SD 1.x") / "vae", tmp_path / "vae")
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def age(tensors: State) -> None:
        for key in [key for key in tensors if ".attentions.0.to_" in key]:
            old = key
            for new_name, old_name in names.items():
                old = old.replace(f".{new_name}.", f".{old_name}.")
            value = tensors.pop(key)
            tensors[old] = value[:, :, None, None].contiguous() if value.ndim == 2 else value

    rewrite(vae / "diffusion_pytorch_model.safetensors", age)
    expected = read_vae(model_folder("SD 1.x") / "vae").load("cpu", torch.float32).state_dict()
    found = read_vae(vae).load("cpu", torch.float32).state_dict()
    assert_equal({"vae": found}, {"vae": expected})


@pytest.mark.parametrize("prefixed", [True, False])
def test_text_encoder_keys_with_and_without_their_first_word_are_understood(
    prefixed: bool, model_folder: Folder, tmp_path: Path
) -> None:
    folder = copied(model_folder("SDXL") / "text_encoder_2", tmp_path / "text_encoder_2")
    expected = read_text_encoder(folder).load("cpu", torch.float32).state_dict()
    positions = {"text_model.embeddings.position_ids": torch.arange(12)[None]}
    spelt = {**{key: value.clone() for key, value in expected.items()}, **positions}
    if not prefixed:
        spelt = {key.removeprefix("text_model."): value for key, value in spelt.items()}
    safetensors.torch.save_file(spelt, folder / "model.safetensors")
    found = read_text_encoder(folder).load("cpu", torch.float32).state_dict()
    assert_equal({"text": found}, {"text": expected})


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("unet", "class_embed_type", "timestep"),
        ("unet", "num_class_embeds", 1000),
        ("unet", "time_cond_proj_dim", 256),
        ("unet", "encoder_hid_dim_type", "text_image_proj"),
        ("unet", "addition_embed_type", "image"),
        ("unet", "resnet_time_scale_shift", "scale_shift"),
        ("unet", "resnet_skip_time_act", True),
        ("unet", "center_input_sample", True),
        ("unet", "flip_sin_to_cos", False),
        ("unet", "mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("unet", "act_fn", "gelu"),
        ("unet", "_class_name", "UNetSpatioTemporalConditionModel"),
        ("unet", "down_block_types", ["CrossAttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"]),
        ("unet", "up_block_types", ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]),
        ("unet", "layers_per_block", [2, 2, 2]),
        ("unet", "block_out_channels", None),
        ("unet", "in_channels", "four"),
        ("vae", "latents_mean", [0.0, 0.0, 0.0, 0.0]),
        ("vae", "shift_factor", 0.1),
        ("vae", "use_quant_conv", False),
        ("vae", "_class_name", "AutoencoderTiny"),
        ("vae", "down_block_types", ["AttnDownEncoderBlock2D"] * 3),
        ("text_encoder", "hidden_act", "relu"),
        ("text_encoder", "num_attention_heads", 7),
        ("scheduler", "prediction_type", "sample"),
        ("scheduler", "beta_schedule", "squaredcos_cap_v2"),
        ("scheduler", "trained_betas", [0.1, 0.2]),
        ("scheduler", "_class_name", "EDMEulerScheduler"),
        ("scheduler", "_class_name", "FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_settings_that_we_do_not_compute_are_refused(
    file: str, field: str, value: object, model_folder: Folder, tmp_path: Path
) -> None:
    model = copied(model_folder("SD 1.x"), tmp_path / "model")
    config = model / file / ("scheduler_config.json" if file == "scheduler" else "config.json")
    configure(config, **{field: value})

    def build() -> None:
        for component in read_folder(model).components:
            component.skeleton()

    by_itself = value is None or isinstance(value, int | list) or value == "four"  # else the message says the field
    with pytest.raises(ModelError, match="" if by_itself else rf"{file}/.*config\.json.*{field}"):
        build()


@pytest.mark.parametrize("file", ["unet/config.json", "vae/config.json", "model_index.json"])
@pytest.mark.parametrize("content", ["", "[]", "{}", "{"])
def test_broken_configs_are_named(file: str, content: str, model_folder: Folder, tmp_path: Path) -> None:
    model = copied(model_folder("SD 1.x"), tmp_path / "model")
    (model / file).write_text(content)
    if (file, content) == ("model_index.json", "{}"):
        assert read_folder(model).family == "SD 1.x"  # says nothing that the folder does not
        return
    with pytest.raises(ModelError, match=file):
        read_folder(model)


def test_a_silent_scheduler_config_means_what_it_means_to_diffusers(tmp_path: Path) -> None:
    config = tmp_path / "scheduler_config.json"
    config.write_text(json.dumps({"_class_name": "DDIMScheduler"}))
    theirs = diffusers.DDIMScheduler.from_config(json.loads(config.read_text()))
    assert torch.equal(read_schedule(config).alphas_cumprod, theirs.alphas_cumprod)


def test_parts_of_different_models_are_refused(model_folder: Folder, tmp_path: Path) -> None:
    model = copied(model_folder("SD 1.x"), tmp_path / "model")
    shutil.rmtree(model / "text_encoder")
    shutil.copytree(model_folder("SD 2.x") / "text_encoder", model / "text_encoder")
    with pytest.raises(ModelError, match="give 1024 channels of text states, but its U-Net reads 768"):
        read_folder(model)
    model = copied(model_folder("SDXL"), tmp_path / "xl")
    configure(model / "model_index.json", requires_aesthetics_score=True)
    with pytest.raises(ModelError, match="channels of text and sizes"):
        read_folder(model)


def test_models_of_other_kinds_are_refused(model_folder: Folder, tmp_path: Path) -> None:
    model = copied(model_folder("SD 1.x"), tmp_path / "model")
    configure(model / "model_index.json", _class_name="FluxPipeline")
    shutil.rmtree(model / "unet")
    with pytest.raises(ModelError, match=r"'FluxPipeline'.* has no unet/; only Stable Diffusion"):
        read_folder(model)


# -- weights that can't be read --------------------------------------------------------------------------


def test_a_folder_of_pickles_alone_is_refused(model_folder: Folder, tmp_path: Path) -> None:
    model = copied(model_folder("SD 1.x"), tmp_path / "model")
    (model / "unet/diffusion_pytorch_model.safetensors").rename(model / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match=r"diffusion_pytorch_model\.bin is a pickle, .*: convert it"):
        open_checkpoint(str(model))


def forged(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x02}q\x00.",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        (10**12).to_bytes(8, "little") + b"{}",
        forged([]),
        forged({"conv_in.weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, b"12345678"),
        forged({"conv_in.weight": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, b"1234"),
        forged({"conv_in.weight": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
        forged({"conv_in.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
        forged({}),
    ],
)
def test_forged_weights_are_a_model_error(content: bytes, model_folder: Folder, tmp_path: Path) -> None:
    unet = copied(model_folder("SD 1.x") / "unet", tmp_path / "unet")
    (unet / "diffusion_pytorch_model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"diffusion_pytorch_model\.safetensors"):
        read_unet(unet).load("cpu", torch.float32)


@pytest.mark.parametrize("kept", [0.0001, 0.5, 0.999])
def test_a_truncated_download_is_a_model_error(kept: float, model_folder: Folder, tmp_path: Path) -> None:
    unet = copied(model_folder("SD 1.x") / "unet", tmp_path / "unet")
    path = unet / "diffusion_pytorch_model.safetensors"
    with path.open("r+b") as file:
        file.truncate(int(path.stat().st_size * kept))
    with pytest.raises(ModelError, match=r"diffusion_pytorch_model\.safetensors can't be read"):
        read_unet(unet)


@pytest.mark.parametrize(
    "where",
    [
        {"conv_in.weight": "diffusion_pytorch_model-00001-of-00002.safetensors"},
        {"conv_in.weight": "../vae/diffusion_pytorch_model.safetensors"},
        {"conv_in.weight": 7},
        {},
        None,
    ],
)
def test_an_index_of_shards_that_are_not_there_is_a_model_error(
    where: object, model_folder: Folder, tmp_path: Path
) -> None:
    model = copied(model_folder("SD 1.x"), tmp_path / "model")
    (model / "unet/diffusion_pytorch_model.safetensors").unlink()
    (model / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(ModelError, match=r"safetensors\.index\.json"):
        read_folder(model)


# -- what loading costs ----------------------------------------------------------------------------------


def test_weights_of_the_wanted_format_are_not_copied(model_folder: Folder) -> None:
    component = read_unet(model_folder("SD 1.x") / "unet")
    mapped = {
        (int(first, 16), int(last, 16))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if str(component.weights.files[0]) in line
        for first, last in [line.split()[0].split("-")]
    }
    same, converted = component.load("cpu", torch.float32), component.load("cpu", torch.bfloat16)
    for value in same.state_dict().values():
        assert any(first <= value.data_ptr() < last for first, last in mapped)
    for value in converted.state_dict().values():
        assert not any(first <= value.data_ptr() < last for first, last in mapped)


def test_changing_a_loaded_network_leaves_the_file_as_it_was(model_folder: Folder, tmp_path: Path) -> None:
    unet = copied(model_folder("SD 1.x") / "unet", tmp_path / "unet")
    content = (unet / "diffusion_pytorch_model.safetensors").read_bytes()
    module = read_unet(unet).load("cpu", torch.float32)
    for value in module.parameters():
        value.add_(1)
    assert (unet / "diffusion_pytorch_model.safetensors").read_bytes() == content


def test_loading_draws_no_random_numbers(model_folder: Folder) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for part in read_folder(model_folder("SDXL")).components:
        part.load("cpu", torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


def test_loading_leaves_no_weight_without_values(model_folder: Folder) -> None:
    for part in read_folder(model_folder("SDXL")).components:
        module = part.load("cpu", torch.float16)
        values = [*module.parameters(), *module.buffers()]
        assert all(v.device.type == "cpu" and v.dtype == torch.float16 and not v.requires_grad for v in values)
        assert not module.training


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(3), "a": torch.zeros(2, 2).T}
    for name in ("one", "two"):
        write(tmp_path / f"{name}.safetensors", tensors, torch.float16)
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    assert Weights([tmp_path / "one.safetensors"]).dtypes == {"a": "F16", "b": "F16"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.safetensors", "two.safetensors"]


def test_converted_weights_are_the_stored_numbers_and_can_be_saved_again(model_folder: Folder, tmp_path: Path) -> None:
    LatentDiffusion.from_pretrained(model_folder("SDXL")).save_pretrained(tmp_path / "half", "float16")
    model = LatentDiffusion.from_pretrained(tmp_path / "half")
    expected = {
        part: {key: value.half().float() for key, value in state.items()}
        for part, state in ours(model_folder("SDXL")).items()
    }
    assert_equal(ours(tmp_path / "half"), expected)
    model.save_pretrained(tmp_path / "full")
    assert_equal(ours(tmp_path / "full"), expected)


def test_stored_weights_are_for_whom_files_are(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    write(tmp_path / "x.safetensors", {"a": torch.zeros(1)}, torch.float16)
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "file").stat().st_mode
