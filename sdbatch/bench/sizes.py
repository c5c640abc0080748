"""Models of the real sizes with random weights: speed does not ask what a network has learnt."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdbatch.bench.subject import Subject
from sdbatch.diffusion.checkpoint import Checkpoint, unstored
from sdbatch.diffusion.locate import open_checkpoint
from sdbatch.diffusion.pipeline import vae_dtype
from sdbatch.diffusion.schedule import NoiseSchedule
from sdbatch.diffusion.text_encoder import TextEncoder, TextEncoderConfig
from sdbatch.diffusion.unet import UNet, UNetConfig
from sdbatch.diffusion.vae import VAE, VAEConfig
from sdbatch.diffusion.weights import DTYPES, skeletons
from sdbatch.errors import UsageError


@dataclass(frozen=True)
class Size:
    """The networks of a model, as it was published, and what else tells families apart."""

    unet: UNetConfig
    vae: VAEConfig
    texts: tuple[TextEncoderConfig, ...]
    predicts: str = "epsilon"
    zero_empty_prompt: bool = False


_CLIP_L = TextEncoderConfig()

SIZES = {
    "sd15": Size(UNetConfig(), VAEConfig(), (_CLIP_L,)),
    "sd21": Size(
        UNetConfig(
            num_attention_heads=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True, sample_size=96
        ),
        VAEConfig(sample_size=768),
        (
            TextEncoderConfig(
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=23,
                num_attention_heads=16,
                hidden_act="gelu",
            ),
        ),
        predicts="v_prediction",
    ),
    "sdxl": Size(
        UNetConfig(
            block_out_channels=(320, 640, 1280),
            attention=(False, True, True),
            num_attention_heads=(5, 10, 20),
            transformer_layers=(1, 2, 10),
            cross_attention_dim=2048,
            use_linear_projection=True,
            added_sizes_dim=256,
            added_dim=2816,
            sample_size=128,
        ),
        VAEConfig(scaling_factor=0.13025, sample_size=1024, force_upcast=True),
        (
            _CLIP_L,
            TextEncoderConfig(
                hidden_size=1280,
                intermediate_size=5120,
                num_hidden_layers=32,
                num_attention_heads=20,
                hidden_act="gelu",
                projection_dim=1280,
            ),
        ),
        zero_empty_prompt=True,
    ),
    # SD 1.5 with a quarter of its channels, heads as wide as they are there: for machines without a GPU.
    "sd15-quarter": Size(
        UNetConfig(
            block_out_channels=(80, 160, 320, 320),
            num_attention_heads=(2, 2, 2, 2),
            cross_attention_dim=192,
            norm_num_groups=16,
        ),
        VAEConfig(block_out_channels=(32, 64, 128, 128)),
        (TextEncoderConfig(hidden_size=192, intermediate_size=768, num_attention_heads=3),),
    ),
}
_NAMES = ("text_encoder", "text_encoder_2")


def checkpoint_of(name: str) -> Checkpoint:
    """The checkpoint of a size, or of a model that jobs can name. Raises ModelError or UsageError."""
    if name not in SIZES:
        if "/" not in name and ":" not in name and not Path(name).exists():
            raise UsageError(f"bench: model '{name}' is not known; use {', '.join(SIZES)} or what model.uri could say")
        return open_checkpoint(name)
    size = SIZES[name]
    with skeletons():
        unet, vae, texts = UNet(size.unet), VAE(size.vae), [TextEncoder(config) for config in size.texts]
    # The words are the built-in model's: which they are costs nothing, how many a prompt is read as does.
    tokenizer = open_checkpoint("builtin:shapes").tokenizers[0]
    tokenizer = type(tokenizer)(tokenizer.vocab, tokenizer.merges, max_length=77)
    return Checkpoint(
        path=Path(name),
        layout="random",
        unet=unstored("unet", unet),
        vae=unstored("vae", vae),
        text_encoders=tuple(unstored(name, text) for name, text in zip(_NAMES, texts, strict=False)),
        tokenizers=(tokenizer,) * len(texts),
        schedule=NoiseSchedule(prediction_type=size.predicts, set_alpha_to_one=False, steps_offset=1),
        zero_empty_prompt=size.zero_empty_prompt,
    )


def load_subject(checkpoint: Checkpoint, device: str, dtype: str) -> Subject:
    """The model on its device; where the checkpoint has no weights, always the same random ones."""
    kind = DTYPES[dtype]
    of_vae = vae_dtype(checkpoint.vae.config, kind)
    if checkpoint.layout != "random":
        texts = [encoder.load(device, kind) for encoder in checkpoint.text_encoders]
        return Subject(checkpoint, texts, checkpoint.unet.load(device, kind), checkpoint.vae.load(device, of_vae))
    with skeletons():
        networks: list[Any] = [part.kind(part.config) for part in checkpoint.components]
    for number, network in enumerate(networks):
        _randomise(network.to(of_vae if number == 1 else kind).to_empty(device=device), number)
    unet, vae, *texts = networks
    return Subject(checkpoint, texts, unet, vae)


def _randomise(network: nn.Module, seed: int) -> None:
    """Weights at which signals neither die nor explode; biases and norms a little off 0 and 1."""
    generator = torch.Generator(next(network.parameters()).device).manual_seed(seed)
    for name, value in network.named_parameters():
        std = 1.0 / math.sqrt(value[0].numel()) if value.ndim > 1 else 0.02
        value.data.normal_(0.0, std, generator=generator)
        if value.ndim == 1 and name.endswith("weight"):
            value.data.add_(1.0)
    network.eval().requires_grad_(False)
