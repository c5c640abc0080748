"""Checkpoints in the diffusers folder layout: read, write, identify.

FOLDER/model_index.json
       unet/config.json          unet/diffusion_pytorch_model.safetensors
       vae/config.json           vae/diffusion_pytorch_model.safetensors
       text_encoder/config.json  text_encoder/model.safetensors
       tokenizer/vocab.json, merges.txt, tokenizer_config.json
       scheduler/scheduler_config.json
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.resources
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from sdbatch.diffusion.schedule import NoiseSchedule
from sdbatch.diffusion.text_encoder import TextEncoderConfig
from sdbatch.diffusion.tokenizer import BOS, EOS, CLIPTokenizer
from sdbatch.diffusion.unet import UNetConfig
from sdbatch.diffusion.vae import VAEConfig
from sdbatch.errors import ModelError


def resolve(uri: str) -> Path:
    """The folder that a model name stands for: ``builtin:NAME`` or a path."""
    if uri.startswith("builtin:"):
        models = Path(str(importlib.resources.files("sdbatch"))) / "models"
        known = sorted(p.parent.name for p in models.glob("*/model_index.json"))
        folder = models / uri.removeprefix("builtin:")
        if folder.name not in known:
            raise ModelError(f"model '{uri}' is not built in; there is: " + ", ".join(f"builtin:{n}" for n in known))
        return folder
    folder = Path(uri).expanduser()
    if folder.suffix in {".ckpt", ".pt", ".pth", ".bin"}:
        raise ModelError(f"model '{uri}' is a pickle, which can run code when opened; convert it to .safetensors")
    if not (folder / "model_index.json").is_file():
        raise ModelError(f"model '{folder.absolute()}' has no model_index.json; name a folder in the diffusers layout")
    return folder


def fingerprint(folder: Path) -> str:
    """sha256 over the names and contents of the files that decide what the model computes."""
    names = [f"{part}/{_weights_name(folder / part)}" for part in ("text_encoder", "unet", "vae")]
    names += [f"{part}/config.json" for part in ("text_encoder", "unet", "vae")]
    names += [f"tokenizer/{name}" for name in ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json")]
    names.append("scheduler/scheduler_config.json")
    digest = hashlib.sha256()
    for name in sorted(name for name in names if (folder / name).is_file()):
        with (folder / name).open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{name}\0{content}\n".encode())
    return digest.hexdigest()


# -- reading ---------------------------------------------------------------------------------------------


class _NoInitialisation(TorchFunctionMode):
    """Skips ``torch.nn.init``, whose random numbers the weights would only replace."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def skeletons() -> Iterator[None]:
    """Networks built in here have shapes, but neither memory nor values, until ``assign`` gives them weights."""
    with torch.device("meta"), _NoInitialisation():
        yield


def read_json(path: Path) -> dict[str, Any]:
    """A config file, or a ModelError that names it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"model file {path} can't be read: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"model file {path} should hold a JSON object")
    return content


def check_keys(module: nn.Module, folder: Path) -> None:
    """Raise ModelError unless the weights in ``folder`` have this module's keys and shapes; reads the header only."""
    path = _weights_file(folder)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            shapes = {_classic(key, folder): tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise ModelError(f"model file {path} can't be read: {error}") from None
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    misshapen = [
        f"{key} is {shapes[key]} but should be {expected[key]}"
        for key in sorted(expected.keys() & shapes.keys())
        if shapes[key] != expected[key]
    ]
    for what, names in (
        ("lacks", sorted(expected.keys() - shapes.keys())),
        ("has unknown", sorted(shapes.keys() - expected.keys() - _IGNORED)),
        ("misshapen", misshapen),
    ):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ModelError(f"model file {path}: {what}: {', '.join(names[:5])}{more}")


def assign(module: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    """Give the weights in ``folder`` to a module built on the meta device; every key and shape must fit."""
    check_keys(module, folder)
    weights = safetensors.torch.load_file(_weights_file(folder))
    named = {_classic(key, folder): value.to(dtype) for key, value in weights.items()}
    module.load_state_dict({key: value for key, value in named.items() if key not in _IGNORED}, assign=True)
    module.eval().requires_grad_(False)


_IGNORED = frozenset({"text_model.embeddings.position_ids"})


def _classic(key: str, folder: Path) -> str:
    """Text encoders' keys begin with ``text_model.``, but some releases of transformers leave that out."""
    return f"text_model.{key}" if folder.name == "text_encoder" and not key.startswith("text_model.") else key


def _weights_name(folder: Path) -> str:
    return "model.safetensors" if folder.name == "text_encoder" else "diffusion_pytorch_model.safetensors"


def _weights_file(folder: Path) -> Path:
    path = folder / _weights_name(folder)
    if not path.is_file():
        raise ModelError(f"model file {path} is missing (only .safetensors weights are read)")
    return path


def read_unet_config(path: Path) -> UNetConfig:
    raw = read_json(path)
    down = raw.get("down_block_types", [])
    unknown = sorted(set(down) - {"CrossAttnDownBlock2D", "DownBlock2D"})
    if unknown:
        raise ModelError(f"model file {path}: down_block_types: '{unknown[0]}' is not supported")
    widths = raw["block_out_channels"]
    # The reference's "attention_head_dim" has always held the number of heads.
    heads = raw.get("num_attention_heads") or raw.get("attention_head_dim", 8)
    return UNetConfig(
        in_channels=raw["in_channels"],
        out_channels=raw["out_channels"],
        block_out_channels=tuple(widths),
        attention=tuple(kind == "CrossAttnDownBlock2D" for kind in down),
        num_attention_heads=tuple(heads) if isinstance(heads, list) else (heads,) * len(widths),
        layers_per_block=raw["layers_per_block"],
        cross_attention_dim=raw["cross_attention_dim"],
        use_linear_projection=bool(raw.get("use_linear_projection")),
        norm_num_groups=raw.get("norm_num_groups", 32),
        norm_eps=raw.get("norm_eps", 1e-5),
        sample_size=raw.get("sample_size") or 64,
    )


def read_vae_config(path: Path) -> VAEConfig:
    raw = read_json(path)
    return VAEConfig(
        in_channels=raw["in_channels"],
        out_channels=raw["out_channels"],
        block_out_channels=tuple(raw["block_out_channels"]),
        layers_per_block=raw["layers_per_block"],
        latent_channels=raw["latent_channels"],
        norm_num_groups=raw.get("norm_num_groups", 32),
        scaling_factor=raw.get("scaling_factor", 0.18215),
        mid_block_add_attention=raw.get("mid_block_add_attention", True),
    )


def read_text_config(path: Path) -> TextEncoderConfig:
    raw = read_json(path)
    names = [field.name for field in dataclasses.fields(TextEncoderConfig)]
    return TextEncoderConfig(**{name: raw[name] for name in names if name in raw})


def read_schedule(path: Path) -> NoiseSchedule:
    raw = read_json(path)
    if raw.get("prediction_type", "epsilon") not in {"epsilon", "v_prediction"}:
        raise ModelError(f"model file {path}: prediction_type '{raw['prediction_type']}' is not supported")
    names = [field.name for field in dataclasses.fields(NoiseSchedule)]
    return NoiseSchedule(**{name: raw[name] for name in names if name in raw})


def read_tokenizer(folder: Path) -> CLIPTokenizer:
    """From vocab.json and merges.txt or, as newer releases of transformers save it, from tokenizer.json."""
    path = folder / "vocab.json"
    try:
        if path.is_file():
            vocab = read_json(path)
            lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
            pairs: list[Any] = [line for line in lines if line and not line.startswith("#version")]
        else:
            path = folder / "tokenizer.json"
            model = read_json(path)["model"]
            vocab, pairs = model["vocab"], model["merges"]
        halves = (pair.split() if isinstance(pair, str) else pair for pair in pairs)
        merges = [(str(left), str(right)) for left, right in halves]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"model file {path} can't be read as a tokenizer: {error}") from None
    config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    pad = config.get("pad_token", EOS)
    return CLIPTokenizer(
        vocab,
        merges,
        max_length=config.get("model_max_length", 77),
        pad_token=pad["content"] if isinstance(pad, dict) else pad,
    )


# -- writing ---------------------------------------------------------------------------------------------


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_weights(folder: Path, module: nn.Module, dtype: torch.dtype) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.detach().to("cpu", dtype).contiguous() for key, value in module.state_dict().items()}
    safetensors.torch.save_file(weights, folder / _weights_name(folder), metadata={"format": "pt"})


def unet_json(config: UNetConfig) -> dict[str, Any]:
    down = ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in config.attention]
    up = ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(config.attention)]
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": list(config.num_attention_heads),
        "block_out_channels": list(config.block_out_channels),
        "center_input_sample": False,
        "cross_attention_dim": config.cross_attention_dim,
        "down_block_types": down,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": config.in_channels,
        "layers_per_block": config.layers_per_block,
        "mid_block_scale_factor": 1,
        "norm_eps": config.norm_eps,
        "norm_num_groups": config.norm_num_groups,
        "out_channels": config.out_channels,
        "sample_size": config.sample_size,
        "up_block_types": up,
        "use_linear_projection": config.use_linear_projection,
    }


def vae_json(config: VAEConfig) -> dict[str, Any]:
    levels = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(config.block_out_channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers_per_block,
        "mid_block_add_attention": config.mid_block_add_attention,
        "norm_num_groups": config.norm_num_groups,
        "out_channels": config.out_channels,
        "scaling_factor": config.scaling_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def text_json(config: TextEncoderConfig, tokenizer: CLIPTokenizer) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        **dataclasses.asdict(config),
        "projection_dim": config.hidden_size,
        "dtype": "float32",  # else transformers would compute in the format of the stored weights
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }


def scheduler_json(schedule: NoiseSchedule) -> dict[str, Any]:
    fields = dataclasses.asdict(schedule)
    if schedule.timestep_spacing is None:
        del fields["timestep_spacing"]
    return {"_class_name": "DDIMScheduler", "clip_sample": False, **fields}


def write_tokenizer(folder: Path, tokenizer: CLIPTokenizer) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(tokenizer.vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in tokenizer.merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": tokenizer.max_length,
            "bos_token": BOS,
            "eos_token": EOS,
            "unk_token": EOS,
            "pad_token": tokenizer.pad_token,
        },
    )


def model_index() -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
