"""The JSON files of a checkpoint in the diffusers folder layout: what they say of networks and schedule, both ways."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from sdbatch.diffusion.image_encoder import ImageEncoderConfig
from sdbatch.diffusion.schedule import NoiseSchedule
from sdbatch.diffusion.text_encoder import TextEncoderConfig
from sdbatch.diffusion.tokenizer import CLIPTokenizer
from sdbatch.diffusion.unet import UNetConfig
from sdbatch.diffusion.vae import VAEConfig
from sdbatch.errors import ModelError

# -- reading ---------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """A config file, or a ModelError that names it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"model file {path} can't be read: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"model file {path} should hold a JSON object")
    return content


#: What configs can ask for and no model of the family does, with the values that ask for nothing.
_UNET_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "_class_name": ("UNet2DConditionModel",),
    "act_fn": ("silu",),
    "addition_embed_type": (None, "text_time"),
    "attention_type": (None, "default"),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (None, False),
    "conv_in_kernel": (None, 3),
    "conv_out_kernel": (None, 3),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (None, False),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_class_embeds": (None,),
    "only_cross_attention": (None, False),
    "resnet_out_scale_factor": (None, 1.0),
    "resnet_skip_time_act": (None, False),
    "resnet_time_scale_shift": (None, "default"),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": (None, "positional"),
    "timestep_post_act": (None,),
}
_VAE_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "_class_name": ("AutoencoderKL",),
    "act_fn": ("silu",),
    "latents_mean": (None,),
    "latents_std": (None,),
    "shift_factor": (None, 0.0),
    "use_post_quant_conv": (True,),
    "use_quant_conv": (True,),
}
_TEXT_ACCEPTED: dict[str, tuple[Any, ...]] = {"hidden_act": ("quick_gelu", "gelu")}


@contextmanager
def understanding(path: Path, accepted: Mapping[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """A config to read settings from. Raises ModelError that names what it lacks and what is not ``accepted``."""
    raw = read_json(path)
    for field, values in accepted.items():
        if field in raw and raw[field] not in values:
            raise ModelError(f"model file {path}: {field}: {raw[field]!r} is not supported")
    try:
        yield raw
    except KeyError as error:
        raise ModelError(f"model file {path}: lacks {error}") from None
    except (AttributeError, ArithmeticError, TypeError, ValueError) as error:
        raise ModelError(f"model file {path}: not understood: {error}") from None


#: Beyond any model's. What is larger would fail, or take all memory, much later.
_MOST = 1_000_000

_Config = TypeVar("_Config", UNetConfig, VAEConfig, TextEncoderConfig, ImageEncoderConfig, NoiseSchedule)


def plausible(config: _Config) -> _Config:
    """Raise ValueError for a setting that is no number where one belongs, or one that no model has."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is None or not re.match(r"int|float|tuple\[int", str(field.type)):
            continue
        for number in value if isinstance(value, tuple) else (value,):
            whole = type(number) is int and (0 if field.name == "steps_offset" else 1) <= number <= _MOST
            fraction = str(field.type) == "float" and type(number) in (int, float) and 0 < number <= _MOST
            if not whole and not fraction:
                raise ValueError(f"{field.name} is {number!r:.100}")
    return config


_BLOCKS = {"CrossAttnDownBlock2D": "CrossAttnUpBlock2D", "DownBlock2D": "UpBlock2D"}


def read_unet_config(path: Path) -> UNetConfig:
    with understanding(path, _UNET_ACCEPTED) as raw:
        down = raw["down_block_types"]
        for kind in down:
            if kind not in _BLOCKS:
                raise ModelError(f"model file {path}: down_block_types: {kind!r} is not supported")
        up = [_BLOCKS[kind] for kind in reversed(down)]
        if raw.get("up_block_types", up) != up:
            raise ModelError(f"model file {path}: up_block_types don't mirror down_block_types")
        widths = raw["block_out_channels"]
        # The reference's "attention_head_dim" has always held the number of heads.
        heads = raw.get("num_attention_heads") or raw.get("attention_head_dim", 8)
        layers = raw.get("transformer_layers_per_block") or 1
        added = raw.get("addition_embed_type") == "text_time"
        size = raw.get("sample_size") or 64
        return plausible(
            UNetConfig(
                in_channels=raw["in_channels"],
                out_channels=raw["out_channels"],
                block_out_channels=tuple(widths),
                attention=tuple(kind == "CrossAttnDownBlock2D" for kind in down),
                num_attention_heads=tuple(heads) if isinstance(heads, list) else (heads,) * len(widths),
                layers_per_block=raw["layers_per_block"],
                transformer_layers=tuple(layers) if isinstance(layers, list) else (layers,) * len(widths),
                cross_attention_dim=raw["cross_attention_dim"],
                use_linear_projection=bool(raw.get("use_linear_projection")),
                added_sizes_dim=raw["addition_time_embed_dim"] if added else None,
                added_dim=raw["projection_class_embeddings_input_dim"] if added else None,
                norm_num_groups=raw.get("norm_num_groups", 32),
                norm_eps=raw.get("norm_eps", 1e-5),
                sample_size=int(size[0] if isinstance(size, list) else size),
            )
        )


def read_vae_config(path: Path) -> VAEConfig:
    with understanding(path, _VAE_ACCEPTED) as raw:
        for field, known in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            for kind in raw.get(field, []):
                if kind != known:
                    raise ModelError(f"model file {path}: {field}: {kind!r} is not supported")
        size = raw.get("sample_size", 512)
        return plausible(
            VAEConfig(
                in_channels=raw["in_channels"],
                out_channels=raw["out_channels"],
                block_out_channels=tuple(raw["block_out_channels"]),
                layers_per_block=raw["layers_per_block"],
                latent_channels=raw["latent_channels"],
                norm_num_groups=raw.get("norm_num_groups", 32),
                scaling_factor=float(raw.get("scaling_factor", 0.18215)),
                mid_block_add_attention=raw.get("mid_block_add_attention", True),
                sample_size=size[0] if isinstance(size, list) else size,
                force_upcast=raw.get("force_upcast", False),
            )
        )


def read_text_config(path: Path) -> TextEncoderConfig:
    with understanding(path, _TEXT_ACCEPTED) as raw:
        names = [field.name for field in dataclasses.fields(TextEncoderConfig) if field.name != "projection_dim"]
        projected = raw.get("architectures") == ["CLIPTextModelWithProjection"]
        settings = {name: raw[name] for name in names if name in raw}
        width = raw.get("projection_dim", 512) if projected else None
        return plausible(TextEncoderConfig(**settings, projection_dim=width))


#: What the reference's schedulers take where a config is silent: not what Stable Diffusion was trained with.
_SILENT = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
_SCHEDULE_ACCEPTED: dict[str, tuple[Any, ...]] = {"trained_betas": (None,)}


def read_schedule(path: Path) -> NoiseSchedule:
    with understanding(path, _SCHEDULE_ACCEPTED) as raw:
        kind = str(raw.get("_class_name"))
        if "EDM" in kind or "FlowMatch" in kind:
            raise ModelError(f"model file {path}: _class_name: '{kind}' is not supported")
        names = [field.name for field in dataclasses.fields(NoiseSchedule)]
        settings = {**_SILENT, **{name: raw[name] for name in names if name in raw}}
        try:
            return plausible(NoiseSchedule(**settings))
        except ModelError as error:
            raise ModelError(f"model file {path}: {error}") from None


# -- writing ---------------------------------------------------------------------------------------------


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def unet_json(config: UNetConfig) -> dict[str, Any]:
    down = ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in config.attention]
    up = ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(config.attention)]
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": config.added_sizes_dim,
        "projection_class_embeddings_input_dim": config.added_dim,
    }
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        **(added if config.added_dim else {}),
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
        "transformer_layers_per_block": list(config.transformer_layers),
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
        "force_upcast": config.force_upcast,
        "in_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers_per_block,
        "mid_block_add_attention": config.mid_block_add_attention,
        "norm_num_groups": config.norm_num_groups,
        "out_channels": config.out_channels,
        "sample_size": config.sample_size,
        "scaling_factor": config.scaling_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def text_json(config: TextEncoderConfig, tokenizer: CLIPTokenizer) -> dict[str, Any]:
    projected = config.projection_dim is not None
    return {
        "architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
        "model_type": "clip_text_model",
        **dataclasses.asdict(config),
        "projection_dim": config.projection_dim or config.hidden_size,
        "dtype": "float32",  # else transformers would compute in the format of the stored weights
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }


def scheduler_json(schedule: NoiseSchedule) -> dict[str, Any]:
    """The schedule as DDIM's config; settings that say nothing are left out."""
    fields = {
        name: value
        for name, value in dataclasses.asdict(schedule).items()
        if value is not None and (value or not name.endswith("_sigmas"))
    }
    return {"_class_name": "DDIMScheduler", "clip_sample": False, **fields}
