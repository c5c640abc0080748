"""The networks of the built-in model, and the noise schedule that they learn."""

from __future__ import annotations

from torch import nn

from sdbatch.diffusion.image_encoder import ImageEncoderConfig, Preprocessing
from sdbatch.diffusion.schedule import NoiseSchedule
from sdbatch.diffusion.text_encoder import TextEncoderConfig
from sdbatch.diffusion.unet import UNet, UNetConfig
from sdbatch.diffusion.vae import VAEConfig

MAX_TOKENS = 32  # the longest caption has 24

VAE_CONFIG = VAEConfig(
    block_out_channels=(16, 32, 64),
    layers_per_block=1,
    norm_num_groups=8,
    scaling_factor=1.0,
    mid_block_add_attention=False,
)
UNET_CONFIG = UNetConfig(
    block_out_channels=(64, 96, 128),
    attention=(False, True, True),
    num_attention_heads=(2, 3, 4),
    layers_per_block=1,
    cross_attention_dim=128,
    norm_num_groups=16,
    sample_size=16,
)
IMAGE_CONFIG = ImageEncoderConfig(
    hidden_size=96,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=64,
    patch_size=8,
)
PROJECTION_DIM = 64
PREPROCESSING = Preprocessing(64, 64, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def noise_schedule(prediction_type: str) -> NoiseSchedule:
    """Down to pure noise (Lin et al. 2024) where v is said; of pure noise ε would say nothing about the picture."""
    return NoiseSchedule(
        prediction_type=prediction_type,
        rescale_betas_zero_snr=prediction_type == "v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,
        set_alpha_to_one=True,
    )


def text_config(vocab_size: int) -> TextEncoderConfig:
    return TextEncoderConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
    )


def start_gently(unet: UNet) -> None:
    """Start as the identity: what is added to a residual stream begins at zero."""
    for name, parameter in unet.named_parameters():
        if name.endswith(("conv2.weight", "conv2.bias", "conv_out.weight", "conv_out.bias")) or ".proj_out." in name:
            nn.init.zeros_(parameter)
