"""A checkpoint: the parts of a model, where their weights lie, and what they were made to do.

Every layout in which models are passed on is read into this one form (``folder``, ``single_file``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdbatch.diffusion.schedule import NoiseSchedule
from sdbatch.diffusion.tokenizer import CLIPTokenizer
from sdbatch.diffusion.weights import Origin, Weights, assign, check, skeletons
from sdbatch.errors import ModelError


@dataclass(frozen=True)
class Component:
    """One network of a checkpoint: its shape, and where its weights lie."""

    name: str  # unet, vae, text_encoder, text_encoder_2; clip, safety_checker
    kind: Callable[[Any], nn.Module]  # its config → the network
    config: Any
    weights: Weights
    origins: Mapping[str, Origin]

    def skeleton(self) -> nn.Module:
        """The network without weights. Raises ModelError unless all of them, and no others, are in the file."""
        with skeletons():
            module = self.kind(self.config)
        wanted = module.state_dict()
        origins = {key: self.origins.get(key, Origin(key)) for key in wanted}
        check(module, self.weights, origins, [self.origins[key].key for key in self.origins.keys() - wanted.keys()])
        return module

    def load(self, device: str, dtype: torch.dtype) -> Any:
        """The network with its weights on ``device``."""
        module = self.skeleton()
        assign(module, self.weights, self.origins, device, dtype)
        return module


def unstored(name: str, module: Any) -> Component:
    """A network that lies in no file yet."""
    return Component(name, type(module), module.config, Weights([]), {})


@dataclass(frozen=True)
class Checkpoint:
    """A whole model, found and understood but not loaded."""

    path: Path
    layout: str
    unet: Component
    vae: Component
    text_encoders: tuple[Component, ...]
    tokenizers: tuple[CLIPTokenizer, ...]
    schedule: NoiseSchedule
    zero_empty_prompt: bool = False  # SDXL: an empty negative prompt is all zeros instead of an encoded text
    aesthetic_score: bool = False  # SDXL refiner: conditioned on a score instead of a target size
    deciding: tuple[Path, ...] = ()  # files beside the weights that decide what the model computes

    def __post_init__(self) -> None:
        """Raise ModelError where the parts don't belong together."""
        unet, latent = self.unet.config, self.vae.config.latent_channels
        texts = [encoder.config for encoder in self.text_encoders]
        if unet.in_channels not in (latent, 2 * latent + 1):
            raise ModelError(
                f"model '{self.path}': its U-Net takes {unet.in_channels} channels; only text to image ({latent}) and "
                f"inpainting ({2 * latent + 1}) are supported"
            )
        for text, tokenizer in zip(texts, self.tokenizers, strict=False):
            highest = max(tokenizer.vocab.values())
            if highest >= text.vocab_size or tokenizer.max_length > text.max_position_embeddings:
                raise ModelError(
                    f"model '{self.path}': its tokenizer gives ids up to {highest} and {tokenizer.max_length} of them, "
                    f"but its text encoder knows {text.vocab_size} and reads {text.max_position_embeddings}: they are "
                    "not of the same model"
                )
        given = {"text states": sum(text.hidden_size for text in texts)}
        read = {"text states": unet.cross_attention_dim}
        if unet.added_dim:
            sizes = 5 if self.aesthetic_score else 6
            given["text and sizes"] = (texts[-1].projection_dim or 0) + sizes * unet.added_sizes_dim
            read["text and sizes"] = unet.added_dim
        for what, channels in given.items():
            if channels != read[what]:
                raise ModelError(
                    f"model '{self.path}': its text encoders give {channels} channels of {what}, but its U-Net reads "
                    f"{read[what]}: they are not of the same model"
                )

    @property
    def components(self) -> tuple[Component, ...]:
        return (self.unet, self.vae, *self.text_encoders)

    @property
    def family(self) -> str:
        """The name that the world has for models of this shape."""
        unet = self.unet.config
        if unet.added_dim:
            name = "SDXL refiner" if self.aesthetic_score else "SDXL"
        else:
            name = {768: "SD 1.x", 1024: "SD 2.x"}.get(unet.cross_attention_dim, "latent diffusion")
        return name + (" inpainting" if unet.in_channels == 9 else "")

    @property
    def default_size(self) -> tuple[int, int]:
        """Width and height in pixels that the model was trained at."""
        pixels = self.unet.config.sample_size * self.vae.config.downscale
        return pixels, pixels

    def fingerprint(self) -> str:
        """sha256 over the names and contents of all files that decide what the model computes."""
        files = {path for component in self.components for path in component.weights.files} | set(self.deciding)
        # A single file is "." to itself: its name may change.
        inside = {str(path.relative_to(self.path)): path for path in files}
        digest = hashlib.sha256()
        for name, path in sorted(inside.items()):
            with path.open("rb") as file:
                digest.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        digest.update(f"{self.zero_empty_prompt} {self.aesthetic_score}".encode())
        if not self.deciding:  # the tokenizers come from elsewhere
            words = [[t.vocab, t.merges, t.pad_token, t.max_length] for t in self.tokenizers]
            digest.update(json.dumps(words, sort_keys=True).encode())
        return digest.hexdigest()
