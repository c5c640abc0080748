"""The names that weights have in single files: ours, which are diffusers', → the original code's."""

from __future__ import annotations

from collections.abc import Mapping

from sdbatch.diffusion.families import UNET, VAE_PREFIX, EncoderPreset
from sdbatch.diffusion.text_encoder import TextEncoder, TextEncoderConfig
from sdbatch.diffusion.unet import UNet, UNetConfig
from sdbatch.diffusion.vae import VAE, VAEConfig
from sdbatch.diffusion.weights import Origin, skeletons

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet_modules(config: UNetConfig) -> dict[str, str]:
    """Every block of the U-Net: our name → the original one, without the prefix."""
    names = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    last = len(config.block_out_channels) - 1
    number = 1
    for level in range(last + 1):
        for layer in range(config.layers_per_block):
            names[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{number}.0"
            names[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{number}.1"
            number += 1
        if level < last:
            names[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    number = 0
    for level in range(last + 1):
        attends = config.attention[last - level]
        for layer in range(config.layers_per_block + 1):
            names[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{number}.0"
            names[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{number}.1"
            if level < last and layer == config.layers_per_block:
                names[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{number}.{1 + attends}.conv"
            number += 1
    return names


def unet_origins(config: UNetConfig) -> dict[str, Origin]:
    return _origins(UNet, config, unet_modules(config), _RESNET, UNET)


def vae_origins(config: VAEConfig) -> dict[str, Origin]:
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    last = len(config.block_out_channels) - 1
    for half, way, blocks, resample in (
        ("encoder", "down", config.layers_per_block, "downsamplers.0.conv"),
        ("decoder", "up", config.layers_per_block + 1, "upsamplers.0.conv"),
    ):
        for layer in ("conv_in", "conv_out"):
            names[f"{half}.{layer}"] = f"{half}.{layer}"
        names[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        for i in (0, 1):
            names[f"{half}.mid_block.resnets.{i}"] = f"{half}.mid.block_{i + 1}"
        names[f"{half}.mid_block.attentions.0"] = f"{half}.mid.attn_1"
        for level in range(last + 1):
            theirs = f"{half}.{way}.{level if way == 'down' else last - level}"
            for i in range(blocks):
                names[f"{half}.{way}_blocks.{level}.resnets.{i}"] = f"{theirs}.block.{i}"
            names[f"{half}.{way}_blocks.{level}.{resample}"] = f"{theirs}.{way}sample.conv"
    inside = {
        "conv_shortcut": "nin_shortcut",
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
    }
    return _origins(VAE, config, names, inside, VAE_PREFIX)


def encoder_origins(preset: EncoderPreset, config: TextEncoderConfig) -> dict[str, Origin]:
    keys = _keys(TextEncoder, config)
    if preset.layout == "clip":
        return {key: Origin(preset.prefix + key) for key in keys}
    return {key: _open_clip(preset.prefix, key) for key in keys}


_OPEN_CLIP = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def _open_clip(prefix: str, key: str) -> Origin:
    if key == "text_projection.weight":
        return Origin(prefix + "text_projection", transposed=True)
    if key in _OPEN_CLIP:
        return Origin(prefix + _OPEN_CLIP[key])
    number, _, inner = key.removeprefix("text_model.encoder.layers.").partition(".")
    module, _, kind = inner.rpartition(".")
    block = f"{prefix}transformer.resblocks.{number}."
    if module in _OPEN_CLIP_LAYER:
        return Origin(f"{block}{_OPEN_CLIP_LAYER[module]}.{kind}")
    third = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj").index(module)
    return Origin(f"{block}attn.in_proj_{kind}", third=third)


def _keys(kind: type, config: object) -> list[str]:
    with skeletons():
        return list(kind(config).state_dict())


def _origins(
    kind: type, config: object, modules: Mapping[str, str], inside: Mapping[str, str], prefix: str
) -> dict[str, Origin]:
    """Each key of a network: the longest of its beginnings that ``modules`` knows, then ``inside`` the block."""
    origins = {}
    for key in _keys(kind, config):
        module, _, leaf = key.rpartition(".")
        inner: list[str] = []
        while module not in modules:
            module, _, part = module.rpartition(".")
            inner.insert(0, part)
        within = ".".join(inner)
        origins[key] = Origin(prefix + ".".join(filter(None, (modules[module], inside.get(within, within), leaf))))
    return origins
