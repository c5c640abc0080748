"""The families of Stable Diffusion: what their single files have in common and don't say themselves."""

from __future__ import annotations

from dataclasses import dataclass

from sdbatch.diffusion.tokenizer import EOS

UNET, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."


@dataclass(frozen=True)
class EncoderPreset:
    """A text encoder in a file: ``clip`` as transformers names it, ``open_clip`` as OpenCLIP does."""

    name: str
    prefix: str
    layout: str
    pad_token: str = EOS
    pooled: bool = False
    most_layers: int | None = None  # layers that files may have beyond these are never used


@dataclass(frozen=True)
class Family:
    """What the files of a family have in common and don't say."""

    encoders: tuple[EncoderPreset, ...]
    heads: int | None  # attention heads at every level; None: 64 channels a head
    scaling_factor: float
    sample_size: int  # latent height and width that the model was trained at
    prediction_type: str | None  # None: there are both kinds
    aesthetic_score: bool = False

    @property
    def sdxl(self) -> bool:
        return self.encoders[-1].pooled


FAMILIES = {
    "SD 1.x": Family(
        (EncoderPreset("text_encoder", "cond_stage_model.transformer.", "clip"),), 8, 0.18215, 64, "epsilon"
    ),
    "SD 2.x": Family(
        (EncoderPreset("text_encoder", "cond_stage_model.model.", "open_clip", "!", most_layers=23),),
        None,
        0.18215,
        64,
        None,
    ),
    "SDXL": Family(
        (
            EncoderPreset("text_encoder", "conditioner.embedders.0.transformer.", "clip"),
            EncoderPreset("text_encoder_2", "conditioner.embedders.1.model.", "open_clip", "!", pooled=True),
        ),
        None,
        0.13025,
        128,
        "epsilon",
    ),
    "SDXL refiner": Family(
        (EncoderPreset("text_encoder_2", "conditioner.embedders.0.model.", "open_clip", "!", pooled=True),),
        None,
        0.13025,
        128,
        "epsilon",
        aesthetic_score=True,
    ),
}
