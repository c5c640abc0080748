"""Checkpoints in one .safetensors file, as their authors' own code writes them (the "original" layout).

    model.diffusion_model.…            U-Net
    first_stage_model.…                VAE
    cond_stage_model.transformer.…     SD 1.x: CLIP's text encoder      cond_stage_model.model.…   SD 2.x: OpenCLIP's
    conditioner.embedders.0.…, .1.…    SDXL: both; its refiner: OpenCLIP's alone

A file has no configuration. The family shows in the names, sizes in the shapes; what neither can tell (the number
of attention heads, the noise schedule) belongs to the family.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from sdbatch.diffusion.checkpoint import Checkpoint, Component
from sdbatch.diffusion.families import FAMILIES, UNET, VAE_PREFIX, EncoderPreset, Family
from sdbatch.diffusion.original_names import encoder_origins, unet_origins, vae_origins
from sdbatch.diffusion.schedule import NoiseSchedule
from sdbatch.diffusion.text_encoder import TextEncoder, TextEncoderConfig
from sdbatch.diffusion.tokenizer import CLIPTokenizer
from sdbatch.diffusion.unet import UNet, UNetConfig
from sdbatch.diffusion.vae import VAE, VAEConfig
from sdbatch.diffusion.weights import Origin, Weights, some, write
from sdbatch.errors import ModelError

#: Keys of networks that mean nothing to a sampler. Nor does anything that belongs to no network.
_IGNORED = re.compile(r".*\.(position_ids|logit_scale|attn_mask)$|first_stage_model\.loss\.")

#: Marks of Karras et al. 2022's preconditioning, with which the same network means something else.
_EDM = ("edm_mean", "edm_vpred.sigma_max")

# -- reading ---------------------------------------------------------------------------------------------


def read_single_file(
    path: Path, tokenizer: Callable[[], CLIPTokenizer], prediction_type: str | None = None
) -> Checkpoint:
    """What lies in ``path``, weights not yet read. ``tokenizer`` is asked for one, since files bring none.

    Raises ModelError where the file is no Stable Diffusion model, or where only ``prediction_type`` could tell
    what it was trained to predict.
    """
    weights = Weights([path])
    preset = FAMILIES[_family(weights)]
    predicts = _prediction(weights, preset, prediction_type)
    unet = _unet_config(weights, preset, predicts)
    vae = _vae_config(weights, preset)
    encoders = tuple(_encoder(weights, encoder) for encoder in preset.encoders)
    parts = (
        Component("unet", UNet, unet, weights, unet_origins(unet)),
        Component("vae", VAE, vae, weights, vae_origins(vae)),
        *(
            Component(encoder.name, TextEncoder, config, weights, _found(weights, encoder, config))
            for encoder, config in zip(preset.encoders, encoders, strict=True)
        ),
    )
    _refuse_unknown(weights, parts, preset)
    zero_snr = "ztsnr" in weights.shapes
    schedule = NoiseSchedule(
        prediction_type=predicts,
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing="trailing" if zero_snr else "leading",
        steps_offset=1,
        set_alpha_to_one=False,
    )
    base = tokenizer().within(min(config.max_position_embeddings for config in encoders))
    return Checkpoint(
        path=path,
        layout="single file",
        unet=parts[0],
        vae=parts[1],
        text_encoders=parts[2:],
        tokenizers=tuple(base.padded_with(encoder.pad_token) for encoder in preset.encoders),
        schedule=schedule,
        zero_empty_prompt=preset.sdxl and not preset.aesthetic_score,
        aesthetic_score=preset.aesthetic_score,
        deciding=(),
    )


def _family(weights: Weights) -> str:
    """By the names of the text encoders' keys. Raises ModelError if this is nothing that we know."""
    if any(mark in weights.shapes for mark in _EDM):
        raise ModelError(f"model file {weights.name}: models with EDM preconditioning are not supported")
    for name, preset in FAMILIES.items():
        prefixes = [encoder.prefix for encoder in preset.encoders]
        if all(any(key.startswith(prefix) for key in weights.shapes) for prefix in prefixes):
            return name
    first = next(iter(sorted(weights.shapes)), "nothing")
    if any(key.startswith("lora_") or ".lora" in key for key in weights.shapes):
        told = "it holds a LoRA, which belongs under model.loras, not a model"
    elif f"{UNET}input_blocks.0.0.weight" in weights.shapes:
        told = "it has a U-Net but no text encoder; use the full checkpoint"
    else:
        told = f"its keys (such as '{first}') are those of no Stable Diffusion model"
    raise ModelError(f"model file {weights.name}: {told}")


def _prediction(weights: Weights, preset: Family, wanted: str | None) -> str:
    """What the network predicts: as the spec says, as the file is marked, as the family always does."""
    if wanted is not None:
        return wanted
    if "v_pred" in weights.shapes:
        return "v_prediction"
    told = _MODELSPEC.get(weights.metadata.get(_PREDICTION, "")) or preset.prediction_type
    if told is None and "global_step" in weights.shapes:
        steps = weights.tensor(Origin("global_step")).flatten()
        told = _STEPS.get(int(steps[0])) if len(steps) else None
    if told is not None:
        return told
    raise ModelError(
        f"model file {weights.name}: nothing in a file of this family tells whether it predicts ε or v; set "
        "model.prediction_type to epsilon (SD 2.x base, 512 pixels) or v_prediction (768 pixels)"
    )


#: ModelSpec, which trainers write into the header: github.com/Stability-AI/ModelSpec.
_PREDICTION = "modelspec.prediction_type"
_MODELSPEC = {"epsilon": "epsilon", "v": "v_prediction"}
#: Steps that the published SD 2.0 base and SD 2.1 were trained for.
_STEPS = {875_000: "epsilon", 110_000: "v_prediction"}


def _shape(weights: Weights, key: str, dims: int) -> tuple[int, ...]:
    if key not in weights.shapes:
        raise ModelError(f"model file {weights.name}: lacks: {key}")
    shape = weights.shapes[key]
    if len(shape) != dims:
        raise ModelError(f"model file {weights.name}: misshapen: {key} is {shape} but should have {dims} dimensions")
    return shape


def _count(weights: Weights, pattern: str) -> int:
    """How many numbers from 0 stand at ``{}`` in some key."""
    before, after = pattern.split("{}")
    numbered = re.compile(rf"{re.escape(before)}(\d{{1,6}}){re.escape(after)}")
    found = {match[1] for key in weights.shapes if (match := numbered.match(key))}
    return next(count for count in itertools.count() if str(count) not in found)


def _unet_config(weights: Weights, preset: Family, predicts: str) -> UNetConfig:
    """The way down, block by block: a stem, then residual blocks and, between levels, a downsampling each."""
    widths: list[int] = []
    depths: list[int] = []
    layers = 1
    context = 768
    _, in_channels = _shape(weights, f"{UNET}input_blocks.0.0.weight", 4)[:2]
    for number in range(1, _count(weights, UNET + "input_blocks.{}.")):
        block = f"{UNET}input_blocks.{number}."
        if f"{block}0.op.weight" in weights.shapes:
            layers = 1
            continue
        out = _shape(weights, f"{block}0.out_layers.3.weight", 4)[0]
        if number == 1 or f"{UNET}input_blocks.{number - 1}.0.op.weight" in weights.shapes:
            widths.append(out)
            depths.append(_count(weights, block + "1.transformer_blocks.{}."))
            layers = 1
        else:
            layers += 1
        if depths[-1]:
            context = _shape(weights, f"{block}1.transformer_blocks.0.attn2.to_k.weight", 2)[1]
    middle = _count(weights, UNET + "middle_block.1.transformer_blocks.{}.")
    if not widths or not any(depths) or not middle:
        raise ModelError(f"model file {weights.name}: its U-Net has no attention to text")
    added = _shape(weights, f"{UNET}label_emb.0.0.weight", 2)[1] if preset.sdxl else None
    projections = [shape for key, shape in weights.shapes.items() if _PROJECTION.match(key)]
    return UNetConfig(
        in_channels=in_channels,
        out_channels=_shape(weights, f"{UNET}out.2.weight", 4)[0],
        block_out_channels=tuple(widths),
        attention=tuple(depth > 0 for depth in depths),
        num_attention_heads=tuple(preset.heads or max(out // 64, 1) for out in widths),
        layers_per_block=layers,
        # The middle is as deep as the last level would be, also where that has no attention of its own.
        transformer_layers=(*(depth or 1 for depth in depths[:-1]), middle),
        cross_attention_dim=context,
        use_linear_projection=all(len(shape) == 2 for shape in projections),
        added_sizes_dim=256 if added else None,
        added_dim=added,
        # Of the family that has both kinds, v is what the models of 768 pixels predict.
        sample_size=96 if preset.prediction_type is None and predicts == "v_prediction" else preset.sample_size,
    )


_PROJECTION = re.compile(re.escape(UNET) + r"input_blocks\.\d+\.1\.proj_in\.weight$")


def _vae_config(weights: Weights, preset: Family) -> VAEConfig:
    prefix = f"{VAE_PREFIX}encoder."
    levels = _count(weights, prefix + "down.{}.")
    layers = _count(weights, prefix + "down.0.block.{}.")
    widths = [_shape(weights, f"{prefix}down.{level}.block.0.conv2.weight", 4)[0] for level in range(levels)]
    if not widths:
        raise ModelError(f"model file {weights.name}: lacks: {prefix}down.0.block.0.conv2.weight")
    return VAEConfig(
        in_channels=_shape(weights, f"{prefix}conv_in.weight", 4)[1],
        out_channels=_shape(weights, f"{VAE_PREFIX}decoder.conv_out.weight", 4)[0],
        block_out_channels=tuple(widths),
        layers_per_block=layers,
        latent_channels=_shape(weights, f"{VAE_PREFIX}post_quant_conv.weight", 4)[0],
        scaling_factor=preset.scaling_factor,
        mid_block_add_attention=f"{prefix}mid.attn_1.q.weight" in weights.shapes,
        sample_size=preset.sample_size * (1 << (levels - 1)),
        force_upcast=preset.sdxl,
    )


def _encoder(weights: Weights, preset: EncoderPreset) -> TextEncoderConfig:
    prefix = preset.prefix
    if preset.layout == "clip":
        stem = "" if _bare(weights, preset) else "text_model."
        layer, wide = f"{stem}encoder.layers.{{}}.", "mlp.fc1.weight"
        tokens, positions = f"{stem}embeddings.token_embedding.weight", f"{stem}embeddings.position_embedding.weight"
    else:
        layer, wide = "transformer.resblocks.{}.", "mlp.c_fc.weight"
        tokens, positions = "token_embedding.weight", "positional_embedding"
    vocabulary, width = _shape(weights, prefix + tokens, 2)
    layers = _count(weights, prefix + layer)
    return TextEncoderConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=_shape(weights, prefix + layer.format(0) + wide, 2)[0],
        num_hidden_layers=min(layers, preset.most_layers or layers),
        num_attention_heads=max(width // 64, 1),
        max_position_embeddings=_shape(weights, prefix + positions, 2)[0],
        hidden_act="quick_gelu" if preset.layout == "clip" else "gelu",
        projection_dim=_shape(weights, f"{prefix}text_projection", 2)[1] if preset.pooled else None,
    )


def _bare(weights: Weights, preset: EncoderPreset) -> bool:
    """Some files leave out the ``text_model.`` that transformers' names begin with."""
    return any(key.startswith(f"{preset.prefix}embeddings.") for key in weights.shapes)


def _found(weights: Weights, preset: EncoderPreset, config: TextEncoderConfig) -> dict[str, Origin]:
    origins = encoder_origins(preset, config)
    if not _bare(weights, preset):
        return origins
    return {key: Origin(preset.prefix + key.removeprefix("text_model.")) for key in origins}


def _refuse_unknown(weights: Weights, parts: tuple[Component, ...], preset: Family) -> None:
    known = {origin.key for part in parts for origin in part.origins.values()}
    unread = []  # what the states of an early layer have no need of
    for encoder in preset.encoders:
        if encoder.most_layers is not None:
            unread += [f"{encoder.prefix}transformer.resblocks.{encoder.most_layers}.", f"{encoder.prefix}text_proj"]
    prefixes = (UNET, VAE_PREFIX, *(encoder.prefix for encoder in preset.encoders))
    unknown = [
        key
        for key in sorted(weights.shapes.keys() - known)
        if key.startswith(prefixes) and not _IGNORED.match(key) and not key.startswith(tuple(unread))
    ]
    if unknown:
        raise ModelError(f"model file {weights.name}: has unknown: {some(unknown)}")


# -- writing ---------------------------------------------------------------------------------------------


def write_single_file(
    path: Path, checkpoint: Checkpoint, states: Mapping[str, Mapping[str, Tensor]], dtype: torch.dtype
) -> None:
    """Write a model's networks, ``states`` by our names, as one file that says what it predicts. Raises ModelError."""
    spelt = {ours: theirs for theirs, ours in _MODELSPEC.items()}
    metadata = {_PREDICTION: spelt[checkpoint.schedule.prediction_type]}
    write(path, original_tensors(checkpoint, states), dtype, metadata)


def original_tensors(checkpoint: Checkpoint, states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a model's networks, by our names, under the names and in the forms of a single file.

    Raises ModelError for a model that belongs to none of the families that have such files.
    """
    preset = FAMILIES.get(checkpoint.family.removesuffix(" inpainting"))
    if preset is None:
        raise ModelError(f"model '{checkpoint.path}': {checkpoint.family} has no single-file layout")
    origins = {"unet": unet_origins(checkpoint.unet.config), "vae": vae_origins(checkpoint.vae.config)}
    for encoder, part in zip(preset.encoders, checkpoint.text_encoders, strict=True):
        origins[part.name] = encoder_origins(encoder, part.config)
    tensors: dict[str, Tensor] = {}
    fused: dict[str, dict[int, Tensor]] = {}
    for name, state in states.items():
        for key, value in state.items():
            origin = origins[name][key]
            if origin.third is not None:
                fused.setdefault(origin.key, {})[origin.third] = value
            elif origin.transposed:
                tensors[origin.key] = value.T
            elif name == "vae" and ".attentions." in key and value.ndim == 2:
                tensors[origin.key] = value[:, :, None, None]
            else:
                tensors[origin.key] = value
    tensors |= {key: torch.cat([thirds[i] for i in range(3)]) for key, thirds in fused.items()}
    if checkpoint.schedule.prediction_type == "v_prediction":
        tensors["v_pred"] = torch.tensor([])
    if checkpoint.schedule.rescale_betas_zero_snr:
        tensors["ztsnr"] = torch.tensor([])
    return tensors
