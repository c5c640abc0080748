"""One-file checkpoints: their names against diffusers' converter, their meaning from shapes alone, and back again."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers.loaders import single_file_utils as reference
from torch import Tensor, nn

from sdbatch.diffusion import LatentDiffusion, open_checkpoint
from sdbatch.diffusion.checkpoint import Checkpoint, unstored
from sdbatch.diffusion.configs import read_text_config, read_unet_config, read_vae_config
from sdbatch.diffusion.families import FAMILIES
from sdbatch.diffusion.schedule import NoiseSchedule
from sdbatch.diffusion.single_file import original_tensors, read_single_file, write_single_file
from sdbatch.diffusion.text_encoder import TextEncoder
from sdbatch.diffusion.unet import UNet, UNetConfig
from sdbatch.diffusion.vae import VAE
from sdbatch.diffusion.weights import Weights, skeletons
from sdbatch.errors import ModelError
from tests.diffusion.families import FULL, SMALL, TOKENIZER, shapes

pytestmark = pytest.mark.filterwarnings("ignore")  # the oracles warn of one another

Folder = Callable[[str], Path]
State = dict[str, Tensor]
UNET = "model.diffusion_model."


def by_the_reference(name: str, original: State) -> dict[str, State]:
    """What diffusers' converter makes of a file: state dicts by network."""
    family = SMALL[name]
    preset = FAMILIES[name.removesuffix(" inpainting")]
    states = {
        "unet": reference.convert_ldm_unet_checkpoint(dict(original), dict(family.unet, layers_per_block=2)),
        "vae": reference.convert_ldm_vae_checkpoint(dict(original), family.vae),
    }
    for encoder in preset.encoders:
        if encoder.layout == "clip":
            states[encoder.name] = reference.convert_ldm_clip_checkpoint(dict(original))
        else:
            oracle = next(e for e in family.encoders if e.name == encoder.name)
            with torch.device("meta"):
                module = oracle.build()
            states[encoder.name] = reference.convert_open_clip_checkpoint(module, dict(original), encoder.prefix)
    return states


@cache
def full_size(name: str) -> tuple[Checkpoint, dict[str, nn.Module], dict[str, nn.Module]]:
    """A published model on the meta device: as a checkpoint, and its networks, ours and the references'."""
    full, folder = FULL[name], Path(tempfile.mkdtemp())
    with torch.device("meta"):
        theirs = {"unet": full.build_unet(), "vae": full.build_vae()}
        theirs |= {encoder.name: encoder.build() for encoder in full.encoders}
    for part, module in theirs.items():
        if part in ("unet", "vae"):
            module.save_config(folder / part)
        else:
            module.config.architectures = [type(module).__name__]
            module.config.save_pretrained(folder / part)
    with skeletons():
        ours: dict[str, nn.Module] = {
            "unet": UNet(read_unet_config(folder / "unet/config.json")),
            "vae": VAE(read_vae_config(folder / "vae/config.json")),
        }
        ours |= {part: TextEncoder(read_text_config(folder / part / "config.json")) for part in list(theirs)[2:]}
    shutil.rmtree(folder)
    parts = {part: unstored(part, module) for part, module in ours.items()}
    checkpoint = Checkpoint(
        path=folder,
        layout="test",
        unet=parts["unet"],
        vae=parts["vae"],
        text_encoders=tuple(list(parts.values())[2:]),
        tokenizers=(),
        schedule=NoiseSchedule(prediction_type="v_prediction" if name == "SD 2.x" else "epsilon"),
        aesthetic_score=name == "SDXL refiner",
    )
    return checkpoint, ours, theirs


def states_of(modules: Mapping[str, nn.Module]) -> dict[str, State]:
    return {part: module.state_dict() for part, module in modules.items()}


def write_hollow(path: Path, tensors: State) -> Path:
    """A file of zeros in float16 that takes no room on the disk: a header, then a hole."""
    header, end = {}, 0
    for key, value in tensors.items():
        size = 2 * math.prod(value.shape)
        header[key] = {"dtype": "F16", "shape": list(value.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


@pytest.fixture(scope="session")
def small_file(model_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A family's small model as one file."""

    def find(name: str) -> Path:
        path = tmp_path_factory.getbasetemp() / f"{name.replace(' ', '-')}.safetensors"
        if not path.exists():
            LatentDiffusion.from_pretrained(model_folder(name)).save_single_file(path)
        return path

    return find


def read(path: Path, prediction_type: str | None = None) -> Checkpoint:
    return read_single_file(path, lambda: TOKENIZER, prediction_type)


def build(path: Path) -> None:
    """Whatever is wrong with a file shows before its weights are read."""
    for component in read(path).components:
        component.skeleton()


def plain(config: object) -> object:
    """Without the number of transformer blocks where there is no transformer: on levels but the last, the middle's."""
    if not isinstance(config, UNetConfig):
        return config
    kept = [*config.attention[:-1], True]
    layers = tuple(depth if there else 0 for depth, there in zip(config.transformer_layers, kept, strict=True))
    return dataclasses.replace(config, transformer_layers=layers)


def hollow(path: Path, new: Path, change: Callable[[State], object]) -> Path:
    """A file of zeros with the names and shapes of another, ``change``d."""
    tensors = {key: torch.empty(shape, device="meta") for key, shape in Weights([path]).shapes.items()}
    change(tensors)
    return write_hollow(new, tensors)


def changed(path: Path, new: Path, change: Callable[[State], object], metadata: dict[str, str] | None = None) -> Path:
    """A copy of a file with other tensors, and without its metadata."""
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, new, metadata)
    return new


# -- names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FULL)
def test_full_size_names_convert_to_the_references(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, ours, theirs = full_size(name)
    original = original_tensors(checkpoint, states_of(ours))
    monkeypatch.setitem(SMALL, name, FULL[name])
    converted = by_the_reference(name, original)
    for part, module in theirs.items():
        prefix = "text_model." if part.startswith("text") else ""
        found = {key: tuple(value.shape) for key, value in converted[part].items()}
        assert found == shapes(module, prefix), part


@pytest.mark.parametrize("name", SMALL)
def test_diffusers_converts_our_files_to_the_same_weights(name: str, model_folder: Folder, small_file: Folder) -> None:
    converted = by_the_reference(name, safetensors.torch.load_file(small_file(name)))
    for component in open_checkpoint(str(model_folder(name))).components:
        weights = component.load("cpu", torch.float32).state_dict()
        assert converted[component.name].keys() == weights.keys()
        for key, value in weights.items():
            assert torch.equal(converted[component.name][key], value), key


# -- meaning ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FULL)
def test_a_published_models_config_is_read_off_its_shapes(name: str, tmp_path: Path) -> None:
    checkpoint, ours, _ = full_size(name)
    original = original_tensors(checkpoint, states_of(ours))
    if name == "SD 2.x":  # the encoder's last layer is in the published files, but not in the model
        for key in [key for key in original if ".resblocks.22." in key]:
            original[key.replace(".22.", ".23.")] = original[key]
        original["cond_stage_model.model.text_projection"] = torch.empty(1024, 1024, device="meta")
    found = read(write_hollow(tmp_path / "model.safetensors", original))
    assert found.family == name
    assert found.default_size == checkpoint.default_size
    for component, expected in zip(found.components, checkpoint.components, strict=True):
        assert component.name == expected.name
        assert plain(component.config) == plain(expected.config)
        component.skeleton()
    assert found.schedule.prediction_type == checkpoint.schedule.prediction_type
    assert (found.zero_empty_prompt, found.aesthetic_score) == (name == "SDXL", name == "SDXL refiner")
    pads = [tokenizer.pad_token for tokenizer in found.tokenizers]
    assert pads == ["!" if encoder.config.hidden_act == "gelu" else "<|endoftext|>" for encoder in found.text_encoders]


@pytest.mark.parametrize("name", SMALL)
def test_a_small_models_config_is_read_off_its_shapes(name: str, model_folder: Folder, small_file: Folder) -> None:
    found, expected = read(small_file(name)), open_checkpoint(str(model_folder(name)))
    assert found.family == expected.family == name
    configs = [[plain(part.config) for part in model.components] for model in (found, expected)]
    assert configs[0] == configs[1]
    assert found.schedule == dataclasses.replace(expected.schedule, timestep_spacing="leading")


# -- there and back --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", SMALL)
def test_file_to_folder_to_file_is_the_identity(
    name: str, dtype: str, model_folder: Folder, small_file: Folder, tmp_path: Path
) -> None:
    first = small_file(name)
    tokenizer = str(model_folder(name) / ("tokenizer_2" if name == "SDXL refiner" else "tokenizer"))
    if dtype == "float16":
        model = LatentDiffusion.from_pretrained(first, tokenizer=tokenizer)
        first = tmp_path / "first.safetensors"
        model.save_single_file(first, dtype)
    LatentDiffusion.from_pretrained(first, tokenizer=tokenizer).save_pretrained(tmp_path / "folder", dtype)
    second = tmp_path / "second.safetensors"
    LatentDiffusion.from_pretrained(tmp_path / "folder").save_single_file(second, dtype)
    assert second.read_bytes() == first.read_bytes()


def test_a_model_of_no_family_has_no_single_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="latent diffusion has no single-file layout"):
        LatentDiffusion.from_pretrained("builtin:shapes").save_single_file(tmp_path / "shapes.safetensors")


# -- what the network predicts ---------------------------------------------------------------------------


def test_without_a_mark_sd_2_asks_what_it_predicts(small_file: Folder, tmp_path: Path) -> None:
    path = hollow(small_file("SD 2.x"), tmp_path / "x.safetensors", lambda tensors: tensors.pop("v_pred"))
    with pytest.raises(ModelError, match=r"set model\.prediction_type to epsilon .* or v_prediction"):
        read(path)
    assert read(path, "epsilon").schedule.prediction_type == "epsilon"
    assert read(path, "v_prediction").schedule.prediction_type == "v_prediction"
    with pytest.raises(ModelError, match="prediction_type 'x0' is not known"):
        read(path, "x0")


@pytest.mark.parametrize(("predicts", "size"), [("epsilon", 64), ("v_prediction", 96)])
def test_sd_2_that_predicts_v_was_trained_at_768_pixels(predicts: str, size: int, small_file: Folder) -> None:
    assert read(small_file("SD 2.x"), predicts).unet.config.sample_size == size


@pytest.mark.parametrize(("steps", "told"), [(875_000, "epsilon"), (110_000, "v_prediction"), (140_000, None)])
def test_the_steps_of_published_models_tell_what_they_predict(
    steps: int, told: str | None, small_file: Folder, tmp_path: Path
) -> None:
    def mark(tensors: State) -> None:
        del tensors["v_pred"]
        tensors["global_step"] = torch.tensor(steps)

    path = changed(small_file("SD 2.x"), tmp_path / "x.safetensors", mark)
    if told is None:
        with pytest.raises(ModelError, match=r"set model\.prediction_type"):
            read(path)
    else:
        assert read(path).schedule.prediction_type == told


@pytest.mark.parametrize(("mark", "told"), [("epsilon", "epsilon"), ("v", "v_prediction")])
@pytest.mark.parametrize("name", ["SD 1.x", "SD 2.x"])
def test_modelspec_in_the_header_tells_what_a_model_predicts(
    name: str, mark: str, told: str, small_file: Folder, tmp_path: Path
) -> None:
    metadata = {"modelspec.prediction_type": mark}
    path = changed(small_file(name), tmp_path / "x.safetensors", lambda t: t.pop("v_pred", None), metadata)
    assert read(path).schedule.prediction_type == told


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_our_files_say_what_they_predict(predicts: str, small_file: Folder, tmp_path: Path) -> None:
    checkpoint = read(small_file("SD 2.x"), predicts)
    states = {part.name: part.load("cpu", torch.float32).state_dict() for part in checkpoint.components}
    write_single_file(tmp_path / "x.safetensors", checkpoint, states, torch.float32)
    assert read(tmp_path / "x.safetensors").schedule == checkpoint.schedule


@pytest.mark.parametrize("name", ["SD 1.x", "SDXL"])
def test_markers_of_v_and_zero_snr_are_obeyed(name: str, small_file: Folder, tmp_path: Path) -> None:
    marks = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    path = hollow(small_file(name), tmp_path / "x.safetensors", lambda tensors: tensors.update(marks))
    schedule = read(path).schedule
    assert (schedule.prediction_type, schedule.rescale_betas_zero_snr) == ("v_prediction", True)
    assert schedule.timestep_spacing == "trailing"
    assert read(path, "epsilon").schedule.prediction_type == "epsilon"
    plain = read(small_file(name)).schedule
    assert (plain.prediction_type, plain.rescale_betas_zero_snr) == ("epsilon", False)


# -- files of the world ----------------------------------------------------------------------------------


def test_stray_keys_are_ignored(small_file: Folder, tmp_path: Path) -> None:
    stray = {
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(4),
        "alphas_cumprod": torch.zeros(1000),
        "betas": torch.zeros(1000),
        "posterior_mean_coef1": torch.zeros(1000),
        "global_step": torch.tensor(840_000),
        "scale_factor": torch.tensor(0.18215),
        "denoiser.sigmas": torch.zeros(1000),
        "first_stage_model.loss.logvar": torch.tensor(0.0),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(12)[None],
        "cond_stage_model.logit_scale": torch.tensor(4.6),
    }
    path = hollow(small_file("SD 1.x"), tmp_path / "x.safetensors", lambda tensors: tensors.update(stray))
    assert [part.config for part in read(path).components] == [
        part.config for part in read(small_file("SD 1.x")).components
    ]


def test_layers_of_the_text_encoder_beyond_the_last_that_is_used_are_ignored(
    small_file: Folder, tmp_path: Path
) -> None:
    """SD 2.x reads the states before OpenCLIP-H's last layer. Some files have that layer, others have left it out."""
    block = "cond_stage_model.model.transformer.resblocks."

    def deepen(tensors: State) -> None:
        first = {key: value for key, value in tensors.items() if key.startswith(f"{block}0.")}
        for number in range(2, 24):
            tensors |= {key.replace(f"{block}0.", f"{block}{number}."): value for key, value in first.items()}
        tensors["cond_stage_model.model.text_projection"] = torch.zeros(1024, 8)
        tensors["cond_stage_model.model.logit_scale"] = torch.tensor(4.6)

    def leave_out(tensors: State) -> None:
        for key in [key for key in tensors if key.startswith(f"{block}23.")]:
            del tensors[key]

    published = hollow(small_file("SD 2.x"), tmp_path / "published.safetensors", deepen)
    converted = hollow(published, tmp_path / "converted.safetensors", leave_out)
    for path in (published, converted):
        (encoder,) = read(path, "epsilon").text_encoders
        assert encoder.config.num_hidden_layers == 23
        encoder.skeleton()


def test_text_encoder_names_without_their_first_word_are_understood(small_file: Folder, tmp_path: Path) -> None:
    def shorten(tensors: State) -> None:
        for key in [key for key in tensors if ".text_model." in key]:
            tensors[key.replace(".text_model.", ".")] = tensors.pop(key)

    path = changed(small_file("SD 1.x"), tmp_path / "x.safetensors", shorten)
    ours, expected = read(path).text_encoders[0], read(small_file("SD 1.x")).text_encoders[0]
    assert ours.config == expected.config
    for key, value in expected.load("cpu", torch.float32).state_dict().items():
        assert torch.equal(ours.load("cpu", torch.float32).state_dict()[key], value)


def test_linear_layers_and_one_by_one_convolutions_are_the_same(small_file: Folder, tmp_path: Path) -> None:
    def flatten(tensors: State) -> None:
        for key, value in tensors.items():
            if ".attn_1." in key and value.ndim == 4:
                tensors[key] = value[:, :, 0, 0].contiguous()

    path = changed(small_file("SD 1.x"), tmp_path / "x.safetensors", flatten)
    ours, expected = (
        file.vae.load("cpu", torch.float32).state_dict() for file in (read(path), read(small_file("SD 1.x")))
    )
    assert all(torch.equal(ours[key], value) for key, value in expected.items())


# -- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "told"),
    [
        (f"{UNET}input_blocks.1.0.in_layers.2.weight", "lacks"),
        (f"{UNET}input_blocks.1.0.out_layers.3.weight", "lacks"),
        (f"{UNET}input_blocks.1.1.proj_in.weight", "lacks"),
        ("first_stage_model.encoder.conv_in.weight", "lacks"),
        ("first_stage_model.decoder.mid.attn_1.q.weight", "lacks"),
        ("conditioner.embedders.1.model.text_projection", "lacks"),
        ("conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight", "lacks"),
        (f"{UNET}label_emb.0.0.weight", "lacks"),
    ],
)
def test_a_missing_key_is_named(key: str, told: str, small_file: Folder, tmp_path: Path) -> None:
    name = "SD 1.x" if "1.1.proj_in" in key else "SDXL"
    path = hollow(small_file(name), tmp_path / "x.safetensors", lambda tensors: tensors.pop(key))
    with pytest.raises(ModelError, match=rf"x\.safetensors: {told}: {key}"):
        build(path)


@pytest.mark.parametrize(
    "key",
    [
        f"{UNET}input_blocks.0.0.weight",
        f"{UNET}input_blocks.1.0.in_layers.2.weight",
        f"{UNET}time_embed.0.bias",
        "first_stage_model.quant_conv.weight",
        "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight",
        "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight",
        "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_bias",
        "conditioner.embedders.1.model.text_projection",
    ],
)
@pytest.mark.parametrize("shape", [(), (2, 5)])
def test_a_misshapen_key_is_named(key: str, shape: tuple[int, ...], small_file: Folder, tmp_path: Path) -> None:
    path = hollow(small_file("SDXL"), tmp_path / "x.safetensors", lambda t: t.update({key: torch.zeros(shape)}))
    # A shape may also be right by itself and make others wrong: then those are named.
    with pytest.raises(ModelError, match=r"misshapen|not of the same model"):
        build(path)


@pytest.mark.parametrize(
    "key",
    [
        f"{UNET}input_blocks.1.1.transformer_blocks.0.fuser.alpha",
        "first_stage_model.encoder.extra.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.1.adapter.weight",
    ],
)
def test_an_unknown_key_is_named(key: str, small_file: Folder, tmp_path: Path) -> None:
    path = hollow(small_file("SD 1.x"), tmp_path / "x.safetensors", lambda t: t.update({key: torch.zeros(2)}))
    with pytest.raises(ModelError, match=rf"has unknown: {key}"):
        read(path)


def test_quantised_weights_are_refused(small_file: Folder, tmp_path: Path) -> None:
    key = f"{UNET}input_blocks.1.0.in_layers.2.weight"
    path = changed(small_file("SD 1.x"), tmp_path / "x.safetensors", lambda t: t.update({key: t[key].to(torch.int8)}))
    with pytest.raises(ModelError, match=rf"not floating-point numbers: {key} \(I8\)"):
        read(path).unet.load("cpu", torch.float32)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (
            ["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"],
            r"a LoRA, which belongs under model\.loras",
        ),
        (["unet.down_blocks.0.attentions.0.proj_in.lora_A.weight"], r"a LoRA, which belongs under model\.loras"),
        ([f"{UNET}input_blocks.0.0.weight"], "U-Net but no text encoder; use the full checkpoint"),
        (["double_blocks.0.img_attn.norm.key_norm.scale"], "such as 'double_blocks.*no Stable Diffusion model"),
        ([], "such as 'nothing'"),
    ],
)
def test_files_of_other_things_are_told_apart(keys: list[str], told: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({key: torch.zeros(2, 2) for key in keys}, path)
    with pytest.raises(ModelError, match=told):
        read(path)


def test_other_kinds_of_stable_diffusion_are_told_apart(small_file: Folder, tmp_path: Path) -> None:
    stem = f"{UNET}input_blocks.0.0.weight"
    path = hollow(
        small_file("SD 1.x"), tmp_path / "x.safetensors", lambda t: t.update({stem: torch.zeros(32, 8, 3, 3)})
    )
    with pytest.raises(ModelError, match=r"takes 8 channels; only text to image \(4\) and inpainting \(9\)"):
        read(path)
    path = hollow(small_file("SDXL"), tmp_path / "y.safetensors", lambda t: t.update({"edm_mean": torch.zeros(1)}))
    with pytest.raises(ModelError, match="EDM"):
        read(path)


def test_texts_and_pickles_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "page.safetensors"
    path.write_text("<!doctype html><title>Sign in to see this file</title>")
    with pytest.raises(ModelError, match=r"page\.safetensors can't be read"):
        read(path)
    torch.save({"state_dict": {}}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors can't be read"):
        read(tmp_path / "model.safetensors")
    torch.save({"state_dict": {}}, tmp_path / "model.ckpt")
    with pytest.raises(ModelError, match=r"pickle.*convert it to \.safetensors"):
        open_checkpoint(str(tmp_path / "model.ckpt"))
