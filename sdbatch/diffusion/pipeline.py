"""Latent diffusion from prompt to picture: encode the text, denoise a latent, decode it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sdbatch.diffusion import folder as diffusers_folder
from sdbatch.diffusion.adapters import Adaptation, adapt
from sdbatch.diffusion.checkpoint import Checkpoint
from sdbatch.diffusion.conditioning import Conditioning, Reading, sent
from sdbatch.diffusion.convolution import pack_convolutions
from sdbatch.diffusion.grids import Step
from sdbatch.diffusion.locate import open_checkpoint
from sdbatch.diffusion.painting import Painting, checked_pixels
from sdbatch.diffusion.samplers import SAMPLERS, Denoiser, most_steps, sample, start_scale, steps_of
from sdbatch.diffusion.schedule import NoiseSchedule
from sdbatch.diffusion.single_file import write_single_file
from sdbatch.diffusion.text_encoder import TextEncoder
from sdbatch.diffusion.texts import Texts, TextStates
from sdbatch.diffusion.tokenizer import CLIPTokenizer
from sdbatch.diffusion.unet import Added, UNet
from sdbatch.diffusion.vae import VAE, VAEConfig
from sdbatch.diffusion.weights import DTYPES, write
from sdbatch.errors import ModelError, UsageError

#: Scores that SDXL's refiner is told, for what is wanted and for what is not.
_AESTHETIC = (6.0, 2.5)
#: Numbers in a layer of the VAE that are computed at once, 16 pictures of 512x512 or 4 of 1024x1024: kernels that count
#: in 32 bits end at twice as many. What is fastest on a GPU is not measured.
_MOST_AT_ONCE = 1 << 30


class LatentDiffusion:
    """A text-to-image model: tokenizers, text encoders, U-Net, VAE and noise schedule on one device."""

    def __init__(self, checkpoint: Checkpoint, text_encoders: Sequence[TextEncoder], unet: UNet, vae: VAE) -> None:
        self.checkpoint = checkpoint
        self.unet = unet
        self.vae = vae
        self.vae_tiling = False  # decode and encode large pictures tile by tile: less memory, soft seams
        self.vae_slicing = False  # decode and encode picture by picture: less memory
        penultimate = unet.config.added_dim is not None
        self.texts = Texts(checkpoint.tokenizers, text_encoders, self.device, penultimate=penultimate)

    # -- loading and saving ------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        uri: str | Path,
        device: str = "cpu",
        dtype: str = "float32",
        *,
        tokenizer: str | None = None,
        prediction_type: str | None = None,
        timestep_spacing: str | None = None,
        adaptations: Sequence[Adaptation] = (),
    ) -> LatentDiffusion:
        """Load ``builtin:NAME``, a folder in the diffusers layout, a single .safetensors file, or ``hf:OWNER/NAME``.

        ``dtype`` is one of float32, float16, bfloat16. ``adaptations`` are LoRAs and textual inversions. Raises
        ModelError, before anything is computed, where a file is missing or a key or shape does not fit.
        """
        if dtype not in DTYPES:
            raise ModelError(f"dtype '{dtype}' is not known; use one of {', '.join(DTYPES)}")
        kind = DTYPES[dtype]
        checkpoint = open_checkpoint(str(uri), tokenizer, prediction_type, adaptations, timestep_spacing)
        model = cls(
            checkpoint,
            [encoder.load(device, kind) for encoder in checkpoint.text_encoders],
            checkpoint.unet.load(device, kind),
            checkpoint.vae.load(device, vae_dtype(checkpoint.vae.config, kind)),
        )
        networks = dict(zip([encoder.name for encoder in checkpoint.text_encoders], model.text_encoders, strict=True))
        adapt(checkpoint, {"unet": model.unet, **networks}, adaptations)
        model._lay_out()
        return model

    def _lay_out(self) -> None:
        """Channels last is faster; on the CPU the U-Net, which is used at every step, has its convolutions packed."""
        networks: list[Any] = [self.vae, self.unet] if self.device.type == "cuda" else [self.vae]
        for network in networks:
            network.to(memory_format=torch.channels_last)
        if self.device.type == "cpu":
            pack_convolutions(self.unet)

    def save_pretrained(self, folder: str | Path, dtype: str = "float32") -> None:
        """Write the model in the diffusers layout; diffusers' pipelines open the folder. Raises ModelError for a model
        with learnt words, which this layout keeps in files of their own."""
        self._refuse_learnt_words()
        diffusers_folder.write_configs(Path(folder), self.checkpoint)
        for name, module in self.networks().items():
            path = Path(folder) / name / f"{diffusers_folder.weights_name(name)}.safetensors"
            write(path, module.state_dict(), DTYPES[dtype])

    def save_single_file(self, path: str | Path, dtype: str = "float32") -> None:
        """Write the model as one original-layout .safetensors file. Raises ModelError for other families, and
        for a model with learnt words, which such files have no place for."""
        self._refuse_learnt_words()
        states = {name: module.state_dict() for name, module in self.networks().items()}
        write_single_file(Path(path), self.checkpoint, states, DTYPES[dtype])

    def _refuse_learnt_words(self) -> None:
        for encoder in self.text_encoders:
            if encoder.text_model.embeddings.token_embedding.num_embeddings != encoder.config.vocab_size:
                raise ModelError("a model with textual inversions can't be saved: they stay files of their own")

    def networks(self) -> dict[str, torch.nn.Module]:
        """All networks by the names of their folders in the diffusers layout."""
        names = [encoder.name for encoder in self.checkpoint.text_encoders]
        return {"unet": self.unet, "vae": self.vae, **dict(zip(names, self.text_encoders, strict=True))}

    # -- the narrow interface to everything else ---------------------------------------------------------

    @property
    def tokenizer(self) -> CLIPTokenizer:
        return self.checkpoint.tokenizers[0]

    @property
    def text_encoders(self) -> list[TextEncoder]:
        return self.texts.encoders

    @property
    def schedule(self) -> NoiseSchedule:
        return self.checkpoint.schedule

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    @property
    def default_size(self) -> tuple[int, int]:
        """Width and height in pixels that the model was trained at."""
        return self.checkpoint.default_size

    def lengths(self, prompts: Sequence[str], reading: Reading = Reading()) -> list[int]:
        """Tokens of each prompt; what is beyond ``tokenizer.room`` is cut or takes another chunk."""
        return self.texts.lengths(prompts, reading)

    @torch.inference_mode()
    def encode(
        self,
        prompts: Sequence[str],
        *,
        size: tuple[int, int] | None = None,
        reading: Reading = Reading(),
        chunks: int = 1,
        negative: bool = False,
    ) -> Conditioning:
        """Prompts → conditioning for pictures of ``size`` (width, height), every prompt read in ``chunks`` chunks.

        ``negative`` prompts say what pictures should not show. Each distinct prompt is read once and by itself: what
        stands beside it changes nothing. Raises UsageError where a prompt that is to be read whole
        (``long_prompts="chunk"``) takes more chunks than that.
        """
        return self._told(prompts, self.texts.each(prompts, reading, chunks, negative), size, negative)

    def condition(
        self,
        prompts: Sequence[str],
        *,
        size: tuple[int, int] | None = None,
        reading: Reading = Reading(),
        chunks: int = 1,
        negative: bool = False,
    ) -> Conditioning:
        """The same as ``encode`` but for rounding, all prompts in one batch, where gradients are to flow."""
        return self._told(prompts, self.texts.together(prompts, reading, chunks, negative), size, negative)

    def _told(
        self, prompts: Sequence[str], read: TextStates, size: tuple[int, int] | None, negative: bool
    ) -> Conditioning:
        """Text as the U-Net is told it: SDXL also hears the pooled text and sizes."""
        states, pooled = read
        if self.unet.config.added_dim is None:
            return Conditioning(states, None)
        width, height = size or self.default_size
        last = [_AESTHETIC[negative]] if self.checkpoint.aesthetic_score else [height, width]
        sizes = sent([[height, width, 0, 0, *last]] * len(prompts), self.device)
        conditioning = Conditioning(states, Added(pooled, sizes.float()))
        if negative and self.checkpoint.zero_empty_prompt:
            return conditioning.blanked(sent([prompt != "" for prompt in prompts], self.device))
        return conditioning

    @torch.inference_mode()
    def with_keys_values(self, conditioning: Conditioning) -> Conditioning:
        """What the U-Net makes of the text alone, once for all steps."""
        return replace(conditioning, keys_values=self.unet.keys_values(conditioning.states))

    @torch.inference_mode()
    def denoise(self, z: Tensor, t: float, conditioning: Conditioning) -> Tensor:
        """The network's output (ε or v) at z (B, in_channels, h, w) and time step t, in float32."""
        timesteps = torch.full((z.shape[0],), t, device=self.device)
        text = conditioning.keys_values or conditioning.states
        return self.unet(z.to(self.dtype), timesteps, text, conditioning.added).float()

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) → pictures (B, 3, H, W), float32 in [0, 1]; NaN where they are not finite."""
        z = (latents / self.vae.config.scaling_factor).to(self._vae_dtype)
        pixels = z[0, 0].numel() * self.vae.config.downscale**2
        pictures = torch.cat([self.vae.decode(part, tiled=self.vae_tiling) for part in self._slices(z, pixels)])
        pictures = pictures.float() / 2 + 0.5
        return torch.where(pictures.isfinite(), pictures.clamp(0, 1), torch.nan)  # clamped, infinite would be white

    @torch.inference_mode()
    def encode_images(self, images: Tensor, noise: Callable[[], Tensor]) -> Tensor:
        """Draw latents (B, C, h, w) float32 from q(z|x) of pictures (B, 3, H, W) in [-1, 1]."""
        x = images.to(self.device, self._vae_dtype)
        parts = [self.vae.encode(part, tiled=self.vae_tiling) for part in self._slices(x, x[0, 0].numel())]
        mean = torch.cat([mean for mean, _ in parts]).float()
        log_variance = torch.cat([log_variance for _, log_variance in parts]).float()
        return self.vae.config.scaling_factor * (mean + (0.5 * log_variance).exp() * noise())

    def _slices(self, x: Tensor, pixels: int) -> Sequence[Tensor]:
        """What of a batch the VAE takes at once, by the size of the pictures alone."""
        widest = self.vae.config.block_out_channels[:2][-1] * pixels  # numbers a picture, where it is at full size
        return torch.split(x, 1 if self.vae_slicing else max(_MOST_AT_ONCE // widest, 1))

    @property
    def _vae_dtype(self) -> torch.dtype:
        return self.vae.post_quant_conv.weight.dtype

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
        eta: float = 0.0,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        reading: Reading = Reading(),
        chunks: int | None = None,
        init_images: np.ndarray | None = None,
        mask_images: np.ndarray | None = None,
        strength: float = 0.8,
        output: Literal["image", "latent"] = "image",
    ) -> Any:
        """Draw one picture a prompt.

        Every prompt has its own seed: ``torch.Generator("cpu").manual_seed(seed)`` draws the start and, in
        samplers that add noise, each step's noise, all in float32. ``guidance_scale`` may differ a prompt,
        but either all are above 1 (classifier-free guidance) or none is.

        ``eta``: noise of DDIM (0 none, 1 as DDPM). ``guidance_rescale``: 0 to 1, pulls a guided output's contrast
        back to the unguided one's (Lin et al. 2024, section 3.4). ``guidance_interval``: guidance acts between these
        shares of the way from noise to picture (Kynkäänniemi et al. 2024). ``chunks``: chunks that every prompt is
        read in; as many as the longest needs when left out.

        ``init_images`` (B, H, W, 3) uint8: pictures to start from, changed by ``strength`` (0 not at all, 1 wholly).
        ``mask_images`` (B, H, W) bool: repaint only where True, keep the rest of ``init_images``.

        Returns pictures (B, H, W, 3) uint8 as a numpy array, or with ``output="latent"`` the final latents
        (B, C, h, w) float32. Raises UsageError for arguments that don't fit together.
        """
        count = len(prompts)
        negatives = [""] * count if negative_prompts is None else list(negative_prompts)
        scales = [float(guidance_scale)] * count if isinstance(guidance_scale, int | float) else list(guidance_scale)
        shape = self._check(count, negatives, seeds, scales, width, height, num_inference_steps, sampler)
        factor = self.vae.config.downscale
        size = shape[2] * factor, shape[1] * factor
        if chunks is None:
            both = self.lengths([*prompts, *negatives], reading)
            chunks = -(-max(*both, 1) // self.tokenizer.room) if reading.long_prompts == "chunk" else 1

        guided = scales[0] > 1.0
        given = self.encode(prompts, size=size, reading=reading, chunks=chunks)
        conditioning = given
        if guided:
            conditioning = self.encode(negatives, size=size, reading=reading, chunks=chunks, negative=True) + given
            conditioning = self.with_keys_values(conditioning)
        if not guided or guidance_interval != (0.0, 1.0):  # some steps are not guided
            given = self.with_keys_values(given)
        by_scale = sent(scales, self.device)[:, None, None, None]
        noise = _noise(seeds, shape, self.device)
        start, steps, painting = self._start(
            sampler, num_inference_steps, noise, count, size, init_images, mask_images, strength
        )
        total = self.schedule.num_train_timesteps - 1

        def network(z: Tensor, step: Step) -> Tensor:
            x = painting.shown(z, step, first=step is steps[0])
            way = 1 - step.t / total
            if not guided or not guidance_interval[0] <= way <= guidance_interval[1]:
                return self.denoise(x, step.t, given)
            # Ho & Salimans 2022, eq. 6, with w = guidance_scale - 1
            without, wanted = self.denoise(torch.cat([x, x]), step.t, conditioning).chunk(2)
            result = without + by_scale * (wanted - without)
            if guidance_rescale:
                spread = wanted.std(dim=(1, 2, 3), keepdim=True) / result.std(dim=(1, 2, 3), keepdim=True)
                result = result * (guidance_rescale * spread + 1 - guidance_rescale)
            return result

        latents = sample(sampler, Denoiser(network, self.schedule), start, steps, noise, eta=eta)
        latents = painting.finished(latents)
        return latents if output == "latent" else to_uint8(self.decode(latents))

    def _start(
        self,
        sampler: str,
        count: int,
        noise: Callable[[], Tensor],
        batch: int,
        size: tuple[int, int],
        init_images: np.ndarray | None,
        mask_images: np.ndarray | None,
        strength: float,
    ) -> tuple[Tensor, Sequence[Step], Painting]:
        """The latents to begin with, the steps to take, and what is known of the pictures."""
        repaints = self.unet.config.in_channels == 9
        if init_images is None or (repaints and mask_images is None):
            if mask_images is not None or repaints:
                raise UsageError("generate: init_images and mask_images must be given together to repaint")
            steps = steps_of(sampler, self.schedule, count)
            return start_scale(sampler, self.schedule, steps) * noise(), steps, Painting()
        taken = min(int(count * strength), count)
        if taken < 1:
            raise UsageError(f"generate: strength {strength:g} of {count} steps leaves no step to take")
        steps = steps_of(sampler, self.schedule, count, taken)
        pixels = sent(checked_pixels(init_images, batch, size, "init_images", 4), self.device)
        images = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        if mask_images is None:
            known, fresh = self.encode_images(images, noise), noise()
            return steps[0].alpha * known + steps[0].sigma * fresh, steps, Painting()
        painted = sent(checked_pixels(mask_images, batch, size, "mask_images", 3), self.device)[:, None].float()
        factor = self.vae.config.downscale
        mask = F.interpolate(painted, size=(size[1] // factor, size[0] // factor))
        whole = taken == count  # repainting wholly starts from pure noise
        seen = None if whole and repaints else self.encode_images(images, noise)
        fresh = noise()
        start = start_scale(sampler, self.schedule, steps) * fresh
        if not whole and seen is not None:
            start = steps[0].alpha * seen + steps[0].sigma * fresh
        if repaints:
            masked = self.encode_images(images * (1 - painted), noise)
            return start, steps, Painting(beside=torch.cat([mask, masked], dim=1))
        return start, steps, Painting(mask=mask, known=seen, noise=fresh)

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
        most = most_steps(sampler, self.schedule)
        if not 1 <= steps <= most:
            raise UsageError(f"generate: num_inference_steps is {steps}; use 1 to {most} with sampler '{sampler}'")
        default_width, default_height = self.default_size
        width, height = width or default_width, height or default_height
        factor = self.vae.config.downscale
        for name, pixels in (("width", width), ("height", height)):
            if pixels <= 0 or pixels % factor:
                raise UsageError(f"generate: {name} is {pixels}; use a positive multiple of {factor}")
        return self.vae.config.latent_channels, height // factor, width // factor


def to_uint8(pictures: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [0, 1] → (B, H, W, 3) uint8."""
    array: np.ndarray = pixels_of(pictures).cpu().numpy()
    return array


def pixels_of(pictures: Tensor) -> Tensor:
    """The same, where it is."""
    return (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def vae_dtype(config: VAEConfig, dtype: torch.dtype) -> torch.dtype:
    """What the VAE computes in: large activations of some overflow float16, and the picture comes out black."""
    return torch.float32 if config.force_upcast and dtype == torch.float16 else dtype


def _noise(seeds: Sequence[int], shape: tuple[int, int, int], device: torch.device) -> Callable[[], Tensor]:
    """A source of float32 noise (B, C, h, w): each image draws from a CPU generator of its own."""
    generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]

    def draw() -> Tensor:
        fresh = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        if device.type == "cuda":  # from pinned memory the copy does not wait for the steps before it
            return fresh.pin_memory().to(device, non_blocking=True)
        return fresh.to(device)

    return draw
