"""CLIP's image encoder, and what pictures go through before it (Radford et al. 2021; Dosovitskiy et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sdbatch.diffusion.text_encoder import Encoder
from sdbatch.errors import UsageError


@dataclass(frozen=True)
class ImageEncoderConfig:
    """Sizes of the image encoder. The defaults are those of CLIP ViT-L/14."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 224  # pixels, each way
    patch_size: int = 14
    hidden_act: str = "quick_gelu"  # or "gelu"
    layer_norm_eps: float = 1e-5


@dataclass(frozen=True)
class Preprocessing:
    """What pictures go through before the image encoder. The defaults are CLIP's."""

    shortest_edge: int = 224  # pixels after resizing
    crop_size: int = 224
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # red, green, blue in [0, 1]
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)


class PatchEmbeddings(nn.Module):
    """A class token, then one token a patch in reading order (Dosovitskiy et al. 2021, eq. 1)."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding((config.image_size // patch) ** 2 + 1, width)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, N, hidden_size)
        first = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class ImageEncoder(nn.Module):
    """Normalised pixels (B, 3, S, S) → states (B, 1 + N, hidden_size) and the pooled state (B, hidden_size).

    N is the number of patches. Pooled is the class token's state after a last layer norm, which the states
    themselves don't go through.
    """

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = PatchEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # the checkpoints' spelling
        self.encoder = Encoder(config, causal=False)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        states = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))[-1]
        return states, self.post_layernorm(states[:, 0])


def preprocess(images: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Pictures (B, H, W, 3) uint8 → normalised pixels (B, 3, S, S) float32, S = ``crop_size``.

    The short side is resized bicubically by Pillow, which smooths what it shrinks as CLIP's training did; the
    centre is kept. Raises UsageError for arrays of another kind.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise UsageError(f"images are {images.dtype} of shape {images.shape}; use uint8 of shape (B, H, W, 3)")
    height, width = images.shape[1:3]
    edge, crop = preprocessing.shortest_edge, preprocessing.crop_size
    # Rounded down as the reference does: with another rounding the crop could be a pixel off.
    height, width = edge * height // min(height, width), edge * width // min(height, width)
    top, left = (height - crop) // 2, (width - crop) // 2
    pixels = np.empty((len(images), crop, crop, 3), dtype=np.float32)
    for i, image in enumerate(images):
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
        pixels[i] = np.asarray(resized)[top : top + crop, left : left + crop]
    mean, std = (np.array(colour, dtype=np.float32) for colour in (preprocessing.mean, preprocessing.std))
    return ((pixels / 255 - mean) / std).transpose(0, 3, 1, 2)
