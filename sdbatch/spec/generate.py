"""What every image request is made with."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from sdbatch.spec.section import Section

SamplerName = Literal[
    "ddpm",
    "ddim",
    "plms",
    "euler",
    "euler_karras",
    "euler_exponential",
    "euler_ancestral",
    "heun",
    "heun_karras",
    "heun_exponential",
    "dpmpp_2m",
    "dpmpp_2m_karras",
    "dpmpp_2m_exponential",
    "dpmpp_2m_sde",
    "dpmpp_2m_sde_karras",
    "dpmpp_2m_sde_exponential",
    "dpmpp_sde",
    "dpmpp_sde_karras",
    "dpmpp_sde_exponential",
    "unipc",
    "unipc_karras",
    "unipc_exponential",
    "lcm",
]


class Generate(Section):
    """Defaults for every image request; a mapped column overrides them row by row."""

    num_images_per_prompt: int = Field(1, ge=1, le=10_000, description="Pictures a row, each with a seed of its own")
    num_inference_steps: int = Field(20, ge=1, le=1000, description="Denoising steps")
    guidance_scale: float = Field(5.0, ge=0, allow_inf_nan=False, description="Classifier-free guidance; ≤ 1: none")
    negative_prompt: str = Field("", description="What pictures should not show")
    sampler: SamplerName = Field("dpmpp_2m", description="How noise becomes a latent")
    eta: float = Field(0.0, ge=0, le=1, description="Noise of the sampler ddim: 0 none, 1 as much as ddpm")
    guidance_rescale: float = Field(
        0.0, ge=0, le=1, description="Pulls contrast back that guidance adds; 0.7 for models with zero terminal SNR"
    )
    guidance_interval: tuple[float, float] = Field(
        (0.0, 1.0), description="Guidance acts between these shares of the way from noise (0) to picture (1)"
    )
    clip_skip: int = Field(0, ge=0, le=12, description="Layers to leave out at the text encoder's end; UIs add 1")
    long_prompts: Literal["truncate", "chunk"] = Field(
        "truncate", description="A prompt beyond what the text encoder reads at once: cut it, or read it in chunks"
    )
    emphasis: bool = Field(False, description="Read (word:1.2), (word) and [word] in prompts as weights")
    strength: float = Field(0.8, gt=0, le=1, description="How much of an init_image is made anew")
    seed: int = Field(0, ge=0, lt=2**63, description="Every image's seed is derived from this one and its row's id")
    width: int | None = Field(None, gt=0, le=16384, description="Pixels; the model's own size when left out")
    height: int | None = Field(None, gt=0, le=16384, description="Pixels; the model's own size when left out")
    round_size: Literal["nearest", "down", "up"] | None = Field(
        None, description="Round sizes that are no multiple of 8; left out, they are an error"
    )

    @field_validator("guidance_interval")
    @classmethod
    def _ascending(cls, interval: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError("should be two numbers between 0 and 1, the smaller one first")
        return interval

    @model_validator(mode="after")
    def _whole_cells(self) -> Self:
        for name, pixels in (("width", self.width), ("height", self.height)):
            if pixels is not None and pixels % 8 and self.round_size is None:
                below = pixels // 8 * 8
                near = f"{below} or {below + 8}" if below else "8"
                raise ValueError(f"has {name} {pixels}; sizes are multiples of 8: {near}, or set round_size")
        return self
