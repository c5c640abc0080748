"""Checkpoints in the diffusers folder layout.

FOLDER/model_index.json
       unet/config.json             unet/diffusion_pytorch_model.safetensors
       vae/config.json              vae/diffusion_pytorch_model.safetensors
       text_encoder/config.json     text_encoder/model.safetensors
       tokenizer/vocab.json, merges.txt, tokenizer_config.json
       scheduler/scheduler_config.json
       text_encoder_2/, tokenizer_2/     SDXL

Weights may be split over files that ``….safetensors.index.json`` lists, or be there as ``….fp16.safetensors`` only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdbatch.diffusion.checkpoint import Checkpoint, Component
from sdbatch.diffusion.configs import (
    read_json,
    read_schedule,
    read_text_config,
    read_unet_config,
    read_vae_config,
    scheduler_json,
    text_json,
    unet_json,
    vae_json,
    write_json,
)
from sdbatch.diffusion.text_encoder import TextEncoder
from sdbatch.diffusion.tokenizer import read_tokenizer, write_tokenizer
from sdbatch.diffusion.unet import UNet
from sdbatch.diffusion.vae import VAE
from sdbatch.diffusion.weights import Origin, Weights
from sdbatch.errors import ModelError

ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
#: Diffusers takes an inpainting model for one of before 0.6 unless it is told.
_SINCE = "0.35.0"


def read_folder(folder: Path) -> Checkpoint:
    """What lies in ``folder``, weights not yet read. Raises ModelError where a part is missing or not understood."""
    index = read_json(folder / "model_index.json")
    names = [name for name in ENCODERS if (folder / name / "config.json").is_file()]
    if not names or not (folder / "unet").is_dir():
        lacking = "unet/" if names else "text_encoder/config.json"
        kind = f" ('{index['_class_name']}')" if "_class_name" in index else ""
        raise ModelError(f"model '{folder}'{kind} has no {lacking}; only Stable Diffusion's families are supported")
    unet, vae = read_unet(folder / "unet"), read_vae(folder / "vae")
    encoders = tuple(read_text_encoder(folder / name) for name in names)
    if unet.config.added_dim and "force_upcast" not in read_json(folder / "vae/config.json"):
        vae = dataclasses.replace(vae, config=dataclasses.replace(vae.config, force_upcast=True))  # SDXL's habit
    spelling = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json")
    deciding = [
        *(f"{name}/config.json" for name in ("unet", "vae", *names)),
        *(f"{ENCODERS[name]}/{file}" for name in names for file in spelling),
        "scheduler/scheduler_config.json",
    ]
    return Checkpoint(
        path=folder,
        layout="diffusers folder",
        unet=unet,
        vae=vae,
        text_encoders=encoders,
        tokenizers=tuple(
            read_tokenizer(folder / ENCODERS[encoder.name]).within(encoder.config.max_position_embeddings)
            for encoder in encoders
        ),
        schedule=read_schedule(folder / "scheduler/scheduler_config.json"),
        zero_empty_prompt=bool(index.get("force_zeros_for_empty_prompt", unet.config.added_dim is not None)),
        aesthetic_score=bool(index.get("requires_aesthetics_score", False)),
        deciding=tuple(folder / name for name in deciding if (folder / name).is_file()),
    )


def read_unet(folder: Path) -> Component:
    config, weights = read_unet_config(folder / "config.json"), find_weights(folder, weights_name(folder.name))
    return Component(folder.name, UNet, config, weights, _plain_origins(weights))


def read_vae(folder: Path) -> Component:
    config, weights = read_vae_config(folder / "config.json"), find_weights(folder, weights_name(folder.name))
    return Component(folder.name, VAE, config, weights, _vae_origins(weights))


def read_text_encoder(folder: Path) -> Component:
    config, weights = read_text_config(folder / "config.json"), find_weights(folder, weights_name(folder.name))
    return Component(folder.name, TextEncoder, config, weights, _text_origins(weights))


def weights_name(part: str) -> str:
    return "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"


def find_weights(folder: Path, stem: str) -> Weights:
    """The weights that lie in ``folder`` under this name, whole or in several files. Raises ModelError."""
    for variant in ("", ".fp16"):
        whole = folder / f"{stem}{variant}.safetensors"
        if whole.is_file():
            return Weights([whole])
        index = folder / f"{stem}.safetensors.index{variant}.json"
        if index.is_file():
            return Weights([folder / name for name in _shards(index)])
    pickles = sorted(path.name for path in folder.glob("*.bin")) if folder.is_dir() else []
    found = f"; {pickles[0]} is a pickle, which can run code when opened: convert it" if pickles else ""
    raise ModelError(f"model file {folder / stem}.safetensors is missing (only .safetensors weights are read{found})")


def _shards(index: Path) -> list[str]:
    """The files beside ``index`` that it spreads the weights over."""
    where = read_json(index).get("weight_map")
    names = [str(name) for name in where.values()] if isinstance(where, dict) else []
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise ModelError(f"model file {index}: {name} that it lists is missing")
    if not names:
        raise ModelError(f"model file {index}: weight_map lists no files")
    return sorted(set(names))


def _plain_origins(weights: Weights) -> dict[str, Origin]:
    return {key: Origin(key) for key in weights.shapes}


def _text_origins(weights: Weights) -> dict[str, Origin]:
    """Keys begin with ``text_model.``, but some releases of transformers leave that out; positions are no weights."""
    origins = {}
    for key in weights.shapes:
        known = key.startswith(("text_model.", "text_projection."))
        origins[key if known else f"text_model.{key}"] = Origin(key)
    origins.pop("text_model.embeddings.position_ids", None)
    return origins


_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _vae_origins(weights: Weights) -> dict[str, Origin]:
    """Attention layers were called otherwise in early releases of diffusers."""
    origins = {}
    for key in weights.shapes:
        module, _, kind = key.rpartition(".")
        parent, _, leaf = module.rpartition(".")
        new = _OLD_ATTENTION.get(leaf) if ".attentions." in key else None
        origins[f"{parent}.{new}.{kind}" if new else key] = Origin(key)
    return origins


def write_configs(folder: Path, checkpoint: Checkpoint) -> None:
    """Everything but the weights."""
    write_json(folder / "unet/config.json", unet_json(checkpoint.unet.config))
    write_json(folder / "vae/config.json", vae_json(checkpoint.vae.config))
    for encoder, tokenizer in zip(checkpoint.text_encoders, checkpoint.tokenizers, strict=True):
        write_json(folder / encoder.name / "config.json", text_json(encoder.config, tokenizer))
        write_tokenizer(folder / ENCODERS[encoder.name], tokenizer)
    write_json(folder / "scheduler/scheduler_config.json", scheduler_json(checkpoint.schedule))
    write_json(folder / "model_index.json", _model_index(checkpoint))


def _model_index(checkpoint: Checkpoint) -> dict[str, Any]:
    names: Sequence[str] = [encoder.name for encoder in checkpoint.text_encoders]
    projected = {e.name for e in checkpoint.text_encoders if e.config.projection_dim is not None}
    text = {}
    for name in ENCODERS if checkpoint.unet.config.added_dim else ["text_encoder"]:
        kind = "CLIPTextModelWithProjection" if name in projected else "CLIPTextModel"
        there = name in names
        text[name] = ["transformers", kind] if there else [None, None]
        text[ENCODERS[name]] = ["transformers", "CLIPTokenizer"] if there else [None, None]
    shared = {
        "_diffusers_version": _SINCE,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        **text,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    repaints = checkpoint.unet.config.in_channels == 9
    if not checkpoint.unet.config.added_dim:
        plain = "StableDiffusionInpaintPipeline" if repaints else "StableDiffusionPipeline"
        safety = {"requires_safety_checker": False, "safety_checker": [None, None]}
        return {"_class_name": plain, **shared, **safety}
    refines = {"requires_aesthetics_score": True} if checkpoint.aesthetic_score else {}
    kind = "Img2Img" if checkpoint.aesthetic_score else "Inpaint" if repaints else ""
    zeros = {"force_zeros_for_empty_prompt": checkpoint.zero_empty_prompt}
    return {"_class_name": f"StableDiffusionXL{kind}Pipeline", **shared, **zeros, **refines}
