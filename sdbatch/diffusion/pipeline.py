"""Latent diffusion from prompt to picture: encode the text, denoise a latent, decode it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sdbatch.diffusion import checkpoint
from sdbatch.diffusion.samplers import SAMPLERS, Step, sample
from sdbatch.diffusion.schedule import NoiseSchedule
from sdbatch.diffusion.text_encoder import TextEncoder
from sdbatch.diffusion.tokenizer import CLIPTokenizer
from sdbatch.diffusion.unet import UNet
from sdbatch.diffusion.vae import VAE
from sdbatch.errors import ModelError, UsageError


@dataclass(frozen=True)
class ModelInfo:
    """What a job must know of a model before it is loaded."""

    folder: Path
    sha256: str
    default_size: tuple[int, int]  # width, height in pixels


def describe(uri: str) -> ModelInfo:
    """Look a model up without loading it. Raises ModelError where a part of it is missing."""
    folder = checkpoint.resolve(uri)
    with checkpoint.skeletons():
        unet = UNet(checkpoint.read_unet_config(folder / "unet/config.json"))
        vae = VAE(checkpoint.read_vae_config(folder / "vae/config.json"))
        text_encoder = TextEncoder(checkpoint.read_text_config(folder / "text_encoder/config.json"))
    checkpoint.read_schedule(folder / "scheduler/scheduler_config.json")
    checkpoint.read_tokenizer(folder / "tokenizer")
    for module, name in ((unet, "unet"), (vae, "vae"), (text_encoder, "text_encoder")):
        checkpoint.check_keys(module, folder / name)
    pixels = unet.config.sample_size * vae.config.downscale
    return ModelInfo(folder, checkpoint.fingerprint(folder), (pixels, pixels))


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class LatentDiffusion:
    """A text-to-image model: tokenizer, text encoder, U-Net, VAE and noise schedule on one device."""

    def __init__(
        self, tokenizer: CLIPTokenizer, text_encoder: TextEncoder, unet: UNet, vae: VAE, schedule: NoiseSchedule
    ) -> None:
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.unet = unet
        self.vae = vae
        self.schedule = schedule

    # -- loading and saving ------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, uri: str | Path, device: str = "cpu", dtype: str = "float32") -> LatentDiffusion:
        """Load ``builtin:NAME`` or a folder in the diffusers layout.

        ``dtype`` is one of float32, float16, bfloat16. Raises ModelError, before anything is computed,
        where a file is missing or a key or shape does not fit.
        """
        if dtype not in DTYPES:
            raise ModelError(f"dtype '{dtype}' is not known; use one of {', '.join(DTYPES)}")
        folder, kind = checkpoint.resolve(str(uri)), DTYPES[dtype]
        with checkpoint.skeletons():
            text_encoder = TextEncoder(checkpoint.read_text_config(folder / "text_encoder/config.json"))
            unet = UNet(checkpoint.read_unet_config(folder / "unet/config.json"))
            vae = VAE(checkpoint.read_vae_config(folder / "vae/config.json"))
        checkpoint.assign(text_encoder, folder / "text_encoder", kind)
        checkpoint.assign(unet, folder / "unet", kind)
        checkpoint.assign(vae, folder / "vae", kind)
        return cls(
            checkpoint.read_tokenizer(folder / "tokenizer"),
            text_encoder.to(device),
            unet.to(device),
            vae.to(device),
            checkpoint.read_schedule(folder / "scheduler/scheduler_config.json"),
        )

    def save_pretrained(self, folder: str | Path, dtype: str = "float32") -> None:
        """Write the model in the diffusers layout; diffusers' StableDiffusionPipeline opens the folder."""
        folder, kind = Path(folder), DTYPES[dtype]
        checkpoint.write_tokenizer(folder / "tokenizer", self.tokenizer)
        checkpoint.write_json(
            folder / "text_encoder/config.json", checkpoint.text_json(self.text_encoder.config, self.tokenizer)
        )
        checkpoint.write_json(folder / "unet/config.json", checkpoint.unet_json(self.unet.config))
        checkpoint.write_json(folder / "vae/config.json", checkpoint.vae_json(self.vae.config))
        checkpoint.write_json(folder / "scheduler/scheduler_config.json", checkpoint.scheduler_json(self.schedule))
        for module, name in ((self.text_encoder, "text_encoder"), (self.unet, "unet"), (self.vae, "vae")):
            checkpoint.write_weights(folder / name, module, kind)
        checkpoint.write_json(folder / "model_index.json", checkpoint.model_index())

    # -- the narrow interface to everything else ---------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    @property
    def default_size(self) -> tuple[int, int]:
        """Width and height in pixels that the model was trained at."""
        pixels = self.unet.config.sample_size * self.vae.config.downscale
        return pixels, pixels

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompts → text states (B, L, D). Text beyond the tokenizer's length is cut."""
        ids = torch.tensor(self.tokenizer(prompts).ids, device=self.device)
        return self.text_encoder(ids)

    @torch.inference_mode()
    def denoise(self, z: Tensor, t: float, conditioning: Tensor) -> Tensor:
        """The network's output (ε or v) at z (B, C, h, w) and time step t, in float32."""
        timesteps = torch.full((z.shape[0],), t, device=self.device)
        return self.unet(z.to(self.dtype), timesteps, conditioning).float()

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) → pictures (B, 3, H, W), float32 in [0, 1]; what is not finite stays so."""
        pictures = self.vae.decode((latents / self.vae.config.scaling_factor).to(self.dtype))
        return (pictures.float() / 2 + 0.5).clamp(0, 1)

    # -- pictures ----------------------------------------------------------------------------------------

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str] | None = None,
        *,
        seeds: Sequence[int],
        width: int | None = None,
        height: int | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float | Sequence[float] = 5.0,
        sampler: str = "ddim",
        output: Literal["image", "latent"] = "image",
    ) -> Any:
        """Draw one picture a prompt.

        Every prompt has its own seed: ``torch.Generator("cpu").manual_seed(seed)`` draws the start and, in
        samplers that add noise, each step's noise, all in float32. ``guidance_scale`` may differ a prompt,
        but either all are above 1 (classifier-free guidance) or none is.

        Returns pictures (B, H, W, 3) uint8 as a numpy array, or with ``output="latent"`` the final latents
        (B, C, h, w) float32. Raises UsageError for arguments that don't fit together.
        """
        count = len(prompts)
        negatives = [""] * count if negative_prompts is None else list(negative_prompts)
        scales = [float(guidance_scale)] * count if isinstance(guidance_scale, int | float) else list(guidance_scale)
        shape = self._check(count, negatives, seeds, scales, width, height, num_inference_steps, sampler)

        guided = scales[0] > 1.0
        conditioning = self.encode([*negatives, *prompts] if guided else prompts)
        weights = torch.tensor(scales, device=self.device)[:, None, None, None]

        def predict(z: Tensor, step: Step) -> tuple[Tensor, Tensor]:
            if guided:  # Ho & Salimans 2022, eq. 6, with w = guidance_scale - 1
                without, given = self.denoise(torch.cat([z, z]), step.t, conditioning).chunk(2)
                network = without + weights * (given - without)
            else:
                network = self.denoise(z, step.t, conditioning)
            return self.schedule.split(network, z, step.alpha, step.sigma)

        latents = sample(sampler, self.schedule, num_inference_steps, predict, _noise(seeds, shape, self.device))
        if output == "latent":
            return latents
        return to_uint8(self.decode(latents))

    def _check(
        self,
        count: int,
        negatives: Sequence[str],
        seeds: Sequence[int],
        scales: Sequence[float],
        width: int | None,
        height: int | None,
        steps: int,
        sampler: str,
    ) -> tuple[int, int, int]:
        """Refuse arguments that don't fit; return the latents' shape (C, h, w)."""
        if count == 0:
            raise UsageError("generate: prompts is empty")
        for name, values in (("negative_prompts", negatives), ("seeds", seeds), ("guidance_scale", scales)):
            if len(values) != count:
                raise UsageError(f"generate: {name} has {len(values)} entries for {count} prompts")
        if len({scale > 1.0 for scale in scales}) > 1:
            raise UsageError("generate: guidance_scale: one batch can't hold scales above 1 and others not above 1")
        if sampler not in SAMPLERS:
            raise UsageError(f"generate: sampler '{sampler}' is not known; use one of {', '.join(SAMPLERS)}")
        if not 1 <= steps <= self.schedule.num_train_timesteps:
            raise UsageError(f"generate: num_inference_steps is {steps}; use 1 to {self.schedule.num_train_timesteps}")
        default_width, default_height = self.default_size
        width, height = width or default_width, height or default_height
        factor = self.vae.config.downscale
        for name, pixels in (("width", width), ("height", height)):
            if pixels <= 0 or pixels % factor:
                raise UsageError(f"generate: {name} is {pixels}; use a positive multiple of {factor}")
        return self.vae.config.latent_channels, height // factor, width // factor


def to_uint8(pictures: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [0, 1] → (B, H, W, 3) uint8."""
    array: np.ndarray = (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return array


def _noise(seeds: Sequence[int], shape: tuple[int, int, int], device: torch.device) -> Callable[[], Tensor]:
    """A source of float32 noise (B, C, h, w): each image draws from a CPU generator of its own."""
    generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]

    def draw() -> Tensor:
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)

    return draw
