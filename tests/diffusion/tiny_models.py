"""Stable Diffusion in miniature: every family's networks with random weights, made and saved by diffusers.

Heads, activations and paddings are those of the family, so that a single file, which can't tell them, says the same.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

TOKENIZER = Path(__file__).parents[2] / "sdbatch/models/shapes/tokenizer"
LENGTH = 16  # tokens that the text encoders read
SIDE = 64  # pixels
POOLED = 40  # width of SDXL's pooled text

DDIM: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def sd1(*, in_channels: int = 4, width: int = 32, layers: int = 3, **scheduler: Any) -> Any:
    """SD 1.x: CLIP's encoder, 8 heads; with 9 ``in_channels`` its inpainting model."""
    kind = diffusers.StableDiffusionInpaintPipeline if in_channels == 9 else diffusers.StableDiffusionPipeline
    return kind(
        vae=vae(),
        text_encoder=text_encoder(width, layers, "quick_gelu"),
        tokenizer=tokenizer(),
        unet=unet(("CrossAttnDownBlock2D", "DownBlock2D"), heads=8, context=width, in_channels=in_channels),
        scheduler=diffusers.DDIMScheduler(**DDIM, **scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd2(**scheduler: Any) -> Any:
    """SD 2.x: OpenCLIP's encoder, linear projections, 64 channels a head, v prediction."""
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder(32, 3, "gelu"),
        tokenizer=tokenizer("!"),
        unet=unet(("CrossAttnDownBlock2D", "DownBlock2D"), heads=(1, 1), context=32, linear=True),
        scheduler=diffusers.DDIMScheduler(**{**DDIM, "prediction_type": "v_prediction", **scheduler}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(**scheduler: Any) -> Any:
    """SDXL base: two encoders, conditioned on sizes, no attention in the first level."""
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(scaling_factor=0.13025, force_upcast=True),
        text_encoder=text_encoder(32, 3, "quick_gelu"),
        tokenizer=tokenizer(),
        text_encoder_2=text_encoder(48, 3, "gelu", POOLED),
        tokenizer_2=tokenizer("!"),
        unet=unet(
            ("DownBlock2D", "CrossAttnDownBlock2D"), heads=(1, 1), context=80, linear=True, depths=(1, 2), sizes=6
        ),
        scheduler=diffusers.DDIMScheduler(**DDIM, **scheduler),
        add_watermarker=False,
    )


def refiner() -> Any:
    """SDXL's refiner: the second encoder alone, and an aesthetic score among the sizes."""
    return diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=vae(scaling_factor=0.13025, force_upcast=True),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=text_encoder(48, 3, "gelu", POOLED),
        tokenizer_2=tokenizer("!"),
        unet=unet(
            ("DownBlock2D", "CrossAttnDownBlock2D"), heads=(1, 1), context=48, linear=True, depths=(1, 2), sizes=5
        ),
        scheduler=diffusers.DDIMScheduler(**DDIM),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def unet(
    down: tuple[str, ...],
    *,
    heads: int | tuple[int, ...],
    context: int,
    in_channels: int = 4,
    linear: bool = False,
    depths: tuple[int, ...] = (1, 1),
    sizes: int = 0,
) -> Any:
    torch.manual_seed(in_channels + sizes)
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": POOLED + sizes * 256,
    }
    ups = {"DownBlock2D": "UpBlock2D", "CrossAttnDownBlock2D": "CrossAttnUpBlock2D"}
    network = diffusers.UNet2DConditionModel(
        in_channels=in_channels,
        block_out_channels=(32, 64),
        down_block_types=down,
        up_block_types=tuple(ups[name] for name in reversed(down)),
        attention_head_dim=heads,
        transformer_layers_per_block=depths,
        cross_attention_dim=context,
        use_linear_projection=linear,
        sample_size=SIDE // 8,
        **(added if sizes else {}),
    )
    return lively(network)


def vae(**settings: Any) -> Any:
    """Eight pixels a latent position, as in every family."""
    torch.manual_seed(2)
    return diffusers.AutoencoderKL(
        block_out_channels=(32, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        sample_size=SIDE,
        **settings,
    ).eval()


def text_encoder(width: int, layers: int, activation: str, projection: int | None = None) -> Any:
    torch.manual_seed(width)
    config = transformers.CLIPTextConfig(
        vocab_size=710,
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=max(width // 64, 1),
        max_position_embeddings=LENGTH,
        hidden_act=activation,
        projection_dim=projection or width,
        bos_token_id=708,
        eos_token_id=709,
        initializer_factor=1.5,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return shifted(kind(config).eval())


def tokenizer(pad_token: str = "<|endoftext|>") -> Any:
    return transformers.CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=LENGTH, pad_token=pad_token)


def lively(network: Any) -> Any:
    """Weights at which prompts and sizes show in what comes out, PyTorch's own being too small for it, and at which
    samplers stay within the usual range."""
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.0 / math.sqrt(parameter[0].numel()))
    network.conv_out.weight.data *= 0.3
    return shifted(network.eval())


def shifted(network: Any) -> Any:
    """Norms and biases that are not all alike, nor zero in the mean."""
    for parameter in network.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.05 + 0.1 * torch.randn(parameter.shape)
    return network


def save(pipeline: Any, folder: Path) -> Path:
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return folder
