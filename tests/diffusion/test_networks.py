"""Each network against diffusers and transformers, on random weights of small sizes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import diffusers
import pytest
import torch
import transformers

from sdbatch.diffusion import checkpoint
from sdbatch.diffusion.text_encoder import TextEncoder, TextEncoderConfig
from sdbatch.diffusion.unet import UNet, UNetConfig
from sdbatch.diffusion.vae import VAE, VAEConfig


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def load_theirs(reference: torch.nn.Module, folder: Path, module: torch.nn.Module) -> torch.nn.Module:
    """The reference's weights, saved by itself and read by us."""
    reference.eval().save_pretrained(folder)
    checkpoint.assign(module, folder, torch.float32)
    return module


UNETS = {
    "sd1": UNetConfig(
        block_out_channels=(32, 64, 96, 96),
        num_attention_heads=(4, 4, 4, 4),
        cross_attention_dim=48,
        norm_num_groups=16,
    ),
    "sd2": UNetConfig(
        block_out_channels=(32, 64, 128, 128),
        num_attention_heads=(1, 2, 4, 4),
        cross_attention_dim=64,
        use_linear_projection=True,
        norm_num_groups=32,
    ),
    "shapes": UNetConfig(
        block_out_channels=(16, 32, 48),
        attention=(False, True, True),
        num_attention_heads=(2, 2, 3),
        layers_per_block=1,
        cross_attention_dim=24,
        norm_num_groups=8,
    ),
}


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("size", [(16, 16), (16, 24), (9, 13)])
def test_unet_computes_what_diffusers_computes(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = UNETS[name]
    theirs = diffusers.UNet2DConditionModel.from_config(checkpoint.unet_json(config))
    with torch.device("meta"):
        ours = UNet(config)
    load_theirs(theirs, tmp_path / "unet", ours)
    z, context = torch.randn(2, 4, *size), torch.randn(2, 7, config.cross_attention_dim)
    timesteps = torch.tensor([999.0, 13.5])
    with torch.no_grad():
        expected = theirs(z, timesteps, context).sample
        assert relative_error(ours(z, timesteps, context), expected) <= 1e-4


VAES = {
    "sd": VAEConfig(block_out_channels=(32, 32, 64, 64), norm_num_groups=16),
    "shapes": VAEConfig(
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    ),
}


@pytest.mark.parametrize("name", VAES)
def test_vae_encodes_and_decodes_as_diffusers_does(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = VAES[name]
    theirs = diffusers.AutoencoderKL.from_config(checkpoint.vae_json(config))
    with torch.device("meta"):
        ours = VAE(config)
    load_theirs(theirs, tmp_path / "vae", ours)
    images = torch.rand(2, 3, 64, 48) * 2 - 1
    with torch.no_grad():
        posterior = theirs.encode(images).latent_dist
        mean, log_variance = ours.encode(images)
        assert relative_error(mean, posterior.mean) <= 1e-4
        assert relative_error(log_variance, posterior.logvar) <= 1e-4
        latents = torch.randn(2, 4, 8, 6)
        assert relative_error(ours.decode(latents), theirs.decode(latents).sample) <= 1e-4


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_text_encoder_computes_what_transformers_computes(activation: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = TextEncoderConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=24,
        hidden_act=activation,
    )
    theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(**dataclasses.asdict(config)))
    with torch.device("meta"):
        ours = TextEncoder(config)
    load_theirs(theirs, tmp_path / "text_encoder", ours)
    ids = torch.randint(0, 300, (3, 24))
    with torch.no_grad():
        assert relative_error(ours(ids), theirs(ids).last_hidden_state) <= 1e-4


def test_full_size_sd15_has_the_reference_key_names_and_shapes() -> None:
    with torch.device("meta"):
        unet, vae, text = UNet(UNetConfig()), VAE(VAEConfig()), TextEncoder(TextEncoderConfig())
        their_unet = diffusers.UNet2DConditionModel.from_config(checkpoint.unet_json(UNetConfig()))
        their_vae = diffusers.AutoencoderKL.from_config(checkpoint.vae_json(VAEConfig()))
        their_text = transformers.CLIPTextModel(
            transformers.CLIPTextConfig(**dataclasses.asdict(TextEncoderConfig()), projection_dim=768)
        )

    def shapes(module: torch.nn.Module, prefix: str = "") -> dict[str, tuple[int, ...]]:
        return {prefix + key.removeprefix(prefix): tuple(value.shape) for key, value in module.state_dict().items()}

    assert shapes(unet) == shapes(their_unet)
    assert shapes(vae) == shapes(their_vae)
    assert shapes(text) == shapes(their_text, "text_model.")
    # Counts that the published SD 1.5 checkpoint is known by.
    assert sum(value.numel() for value in unet.parameters()) == 859_520_964
    assert sum(value.numel() for value in vae.parameters()) == 83_653_863
    assert sum(value.numel() for value in text.parameters()) == 123_060_480
