"""The families of Stable Diffusion as diffusers and transformers build them: full size as published, and small."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from sdbatch.diffusion.tokenizer import BOS, EOS, CLIPTokenizer, write_tokenizer

Config = dict[str, Any]


@dataclass(frozen=True)
class Encoder:
    """A text encoder's config, and whether it projects what it pools."""

    name: str
    config: Config
    projects: bool = False

    def build(self) -> nn.Module:
        kind = transformers.CLIPTextModelWithProjection if self.projects else transformers.CLIPTextModel
        return kind(transformers.CLIPTextConfig(**self.config))


@dataclass(frozen=True)
class Family:
    unet: Config
    vae: Config
    encoders: tuple[Encoder, ...]

    def build_unet(self) -> nn.Module:
        return diffusers.UNet2DConditionModel.from_config(self.unet)

    def build_vae(self) -> nn.Module:
        return diffusers.AutoencoderKL.from_config(self.vae)


def _unet(widths: tuple[int, ...], attends: str, **settings: Any) -> Config:
    """``attends``: a letter a level, c for cross-attention."""
    down = ["CrossAttnDownBlock2D" if letter == "c" else "DownBlock2D" for letter in attends]
    up = ["CrossAttnUpBlock2D" if letter == "c" else "UpBlock2D" for letter in reversed(attends)]
    return {"block_out_channels": widths, "down_block_types": down, "up_block_types": up, **settings}


def _vae(widths: tuple[int, ...], **settings: Any) -> Config:
    levels = len(widths)
    return {
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": 2,
        **settings,
    }


def _clip(hidden: int, inner: int, layers: int, heads: int, act: str, **settings: Any) -> Config:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": act,
        "projection_dim": hidden,
        **settings,
    }


_SDXL = {"use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256}
_SDXL_VAE: Config = {"scaling_factor": 0.13025, "force_upcast": True, "sample_size": 1024}

# -- as published ----------------------------------------------------------------------------------------

_CLIP_L = _clip(768, 3072, 12, 12, "quick_gelu")
_BIG_G = Encoder("text_encoder_2", _clip(1280, 5120, 32, 20, "gelu"), projects=True)
_SD1 = Family(
    _unet((320, 640, 1280, 1280), "cccd", attention_head_dim=8, cross_attention_dim=768, sample_size=64),
    _vae((128, 256, 512, 512), sample_size=512, force_upcast=False),
    (Encoder("text_encoder", _CLIP_L),),
)

FULL = {
    "SD 1.x": _SD1,
    "SD 1.x inpainting": Family({**_SD1.unet, "in_channels": 9}, _SD1.vae, _SD1.encoders),
    "SD 2.x": Family(
        _unet(
            (320, 640, 1280, 1280),
            "cccd",
            attention_head_dim=(5, 10, 20, 20),
            cross_attention_dim=1024,
            use_linear_projection=True,
            upcast_attention=True,
            sample_size=96,
        ),
        _vae((128, 256, 512, 512), sample_size=512, force_upcast=False),
        (Encoder("text_encoder", _clip(1024, 4096, 23, 16, "gelu")),),
    ),
    "SDXL": Family(
        _unet(
            (320, 640, 1280),
            "dcc",
            attention_head_dim=(5, 10, 20),
            transformer_layers_per_block=(1, 2, 10),
            cross_attention_dim=2048,
            projection_class_embeddings_input_dim=2816,
            sample_size=128,
            **_SDXL,
        ),
        _vae((128, 256, 512, 512), **_SDXL_VAE),
        (Encoder("text_encoder", _CLIP_L), _BIG_G),
    ),
    "SDXL refiner": Family(
        _unet(
            (384, 768, 1536, 1536),
            "dccd",
            attention_head_dim=(6, 12, 24, 24),
            transformer_layers_per_block=4,
            cross_attention_dim=1280,
            projection_class_embeddings_input_dim=2560,
            sample_size=128,
            **_SDXL,
        ),
        _vae((128, 256, 512, 512), **_SDXL_VAE),
        (_BIG_G,),
    ),
}

# -- small, by the same rules ----------------------------------------------------------------------------
# Widths are multiples of 32, the groups of a norm. SD 1.x has 8 heads everywhere, the others 64 channels a head.
# The names "SD 1.x" and "SD 2.x" go by the text's width, so that stays.

_WORDS: Config = {"vocab_size": 100, "max_position_embeddings": 12, "bos_token_id": 98, "eos_token_id": 99}
_SMALL_VAE = _vae((32, 32, 64), sample_size=512)
_SMALL_BIG_G = Encoder("text_encoder_2", _clip(64, 96, 3, 1, "gelu", **_WORDS), projects=True)
_SMALL_SD1 = Family(
    _unet((32, 64, 64), "ccd", attention_head_dim=8, cross_attention_dim=768, sample_size=64),
    {**_SMALL_VAE, "sample_size": 256, "force_upcast": False},
    (Encoder("text_encoder", _clip(768, 96, 2, 12, "quick_gelu", **_WORDS)),),
)

SMALL = {
    "SD 1.x": _SMALL_SD1,
    "SD 1.x inpainting": Family({**_SMALL_SD1.unet, "in_channels": 9}, _SMALL_SD1.vae, _SMALL_SD1.encoders),
    "SD 2.x": Family(
        _unet(
            (64, 128, 128),
            "ccd",
            attention_head_dim=(1, 2, 2),
            cross_attention_dim=1024,
            use_linear_projection=True,
            upcast_attention=True,
            sample_size=96,
        ),
        {**_SMALL_VAE, "sample_size": 256, "force_upcast": False},
        (Encoder("text_encoder", _clip(1024, 96, 2, 16, "gelu", **_WORDS)),),
    ),
    "SDXL": Family(
        _unet(
            (32, 64, 128),
            "dcc",
            attention_head_dim=(1, 1, 2),
            transformer_layers_per_block=(1, 2, 3),
            cross_attention_dim=192,
            projection_class_embeddings_input_dim=64 + 6 * 256,
            sample_size=128,
            **_SDXL,
        ),
        {**_SMALL_VAE, **_SDXL_VAE, "sample_size": 512},
        (Encoder("text_encoder", _clip(128, 96, 2, 2, "quick_gelu", **_WORDS)), _SMALL_BIG_G),
    ),
    "SDXL refiner": Family(
        _unet(
            (64, 64, 128, 128),
            "dccd",
            attention_head_dim=(1, 1, 2, 2),
            transformer_layers_per_block=2,
            cross_attention_dim=64,
            projection_class_embeddings_input_dim=64 + 5 * 256,
            sample_size=128,
            **_SDXL,
        ),
        {**_SMALL_VAE, **_SDXL_VAE, "sample_size": 512},
        (_SMALL_BIG_G,),
    ),
}


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


def shapes(module: nn.Module, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """``prefix`` begins every key, as in releases of transformers that write it and not in others."""
    named = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    known = (prefix, "text_projection.")
    return {key if key.startswith(known) else prefix + key: shape for key, shape in named.items()}


def build_pipeline(name: str, folder: Path) -> diffusers.DiffusionPipeline:
    """A small model of a family with random weights. ``folder`` is for the tokenizer's files."""
    family, inpaints = SMALL[name], name.endswith("inpainting")
    torch.manual_seed(0)
    parts = {"unet": family.build_unet(), "vae": family.build_vae()}
    parts |= {encoder.name: encoder.build() for encoder in family.encoders}
    for module in parts.values():
        for value in module.eval().parameters():
            if value.ndim == 1:  # norms begin as ones and zeros, which would hide a mix-up
                value.data += 0.1 * torch.randn_like(value)
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction" if name == "SD 2.x" else "epsilon",
    )
    write_tokenizer(folder, TOKENIZER if name.startswith("SD 1") else TOKENIZER.padded_with("!"))
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    if not name.startswith("SDXL"):
        kind = diffusers.StableDiffusionInpaintPipeline if inpaints else diffusers.StableDiffusionPipeline
        return kind(
            **parts,
            tokenizer=tokenizer,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    parts = {"text_encoder": None, **parts, "scheduler": scheduler, "tokenizer_2": tokenizer}
    if name == "SDXL":
        write_tokenizer(folder, TOKENIZER)
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
        return diffusers.StableDiffusionXLPipeline(**parts, tokenizer=tokenizer)
    return diffusers.StableDiffusionXLImg2ImgPipeline(
        **parts, tokenizer=None, requires_aesthetics_score=True, force_zeros_for_empty_prompt=False
    )


#: Of SMALL's vocabulary: every other token stands for nothing.
TOKENIZER = CLIPTokenizer({**{chr(33 + i): i for i in range(94)}, BOS: 98, EOS: 99}, [], max_length=12)
