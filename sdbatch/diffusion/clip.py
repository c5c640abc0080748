"""CLIP: pictures and prompts in one space, where what fits lies close together (Radford et al. 2021).

The module tree carries the key names of transformers' ``CLIPModel``, whose folders ``clip_folder`` reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from sdbatch.diffusion.checkpoint import Component
from sdbatch.diffusion.clip_folder import ClipFolder, read_clip_folder
from sdbatch.diffusion.configs import text_json, write_json
from sdbatch.diffusion.image_encoder import ImageEncoder, ImageEncoderConfig, Preprocessing, preprocess
from sdbatch.diffusion.text_encoder import TextEncoder, TextEncoderConfig
from sdbatch.diffusion.tokenizer import CLIPTokenizer, write_tokenizer
from sdbatch.diffusion.weights import DTYPES, write
from sdbatch.errors import ModelError, UsageError


class CLIP(nn.Module):
    """Pictures and prompts as unit vectors (B, D), whose scalar product says how well they fit each other."""

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        text: TextEncoderConfig,
        image: ImageEncoderConfig,
        projection_dim: int,
        preprocessing: Preprocessing,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.preprocessing = preprocessing
        self.text_config = text
        self.text_model = TextEncoder(text).text_model
        self.vision_model = ImageEncoder(image)
        self.text_projection = nn.Linear(text.hidden_size, projection_dim, bias=False)
        self.visual_projection = nn.Linear(image.hidden_size, projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.empty(()))  # ln of what training multiplied the cosines by

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str = "cpu", dtype: str = "float32") -> CLIP:
        """Load a folder in the layout of transformers' ``CLIPModel``.

        ``dtype`` is one of float32, float16, bfloat16. Raises ModelError, before anything is computed,
        where a file is missing, asks for what is not done here, or has a key or shape that does not fit.
        """
        if dtype not in DTYPES:
            raise ModelError(f"dtype '{dtype}' is not known; use one of {', '.join(DTYPES)}")
        return clip_component(read_clip_folder(Path(folder))).load(device, DTYPES[dtype])

    @classmethod
    def of(cls, found: ClipFolder) -> CLIP:
        """The network that a folder describes, its weights still to be read."""
        return cls(found.tokenizer(), found.text, found.image, found.projection_dim, found.preprocessing)

    def save_pretrained(self, folder: str | Path, dtype: str = "float32") -> None:
        """Write the folder that ``from_pretrained``, and transformers' ``CLIPModel``, open."""
        folder = Path(folder)
        write(folder / "model.safetensors", self.state_dict(), DTYPES[dtype])
        write_tokenizer(folder, self.tokenizer)
        text = text_json(self.text_config, self.tokenizer)
        vision = dataclasses.asdict(self.vision_model.config) | {"model_type": "clip_vision_model"}
        width = self.text_projection.out_features
        write_json(
            folder / "config.json",
            {
                "architectures": ["CLIPModel"],
                "model_type": "clip",
                "dtype": "float32",
                "projection_dim": width,
                "text_config": text | {"projection_dim": width},
                "vision_config": vision | {"projection_dim": width},
            },
        )
        own = self.preprocessing
        steps = dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), True)
        write_json(
            folder / "preprocessor_config.json",
            {
                "image_processor_type": "CLIPImageProcessor",
                **steps,
                "size": {"shortest_edge": own.shortest_edge},
                "crop_size": {"height": own.crop_size, "width": own.crop_size},
                "resample": Image.Resampling.BICUBIC.value,
                "rescale_factor": 1 / 255,
                "image_mean": list(own.mean),
                "image_std": list(own.std),
            },
        )

    def image_vectors(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (B, 3, S, S) → unit vectors (B, D) float32; gradients flow."""
        _, pooled = self.vision_model(pixels)
        return F.normalize(self.visual_projection(pooled).float(), dim=-1)

    def text_vectors(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) → unit vectors (B, D) float32; gradients flow."""
        # Attention is causal: only from the end of the text on has a state seen all of it. Padding may be the
        # same token; argmax finds the first.
        end = (ids == self.tokenizer.eos_id).int().argmax(dim=-1)
        pooled = self.text_model.final_layer_norm(self.text_model(ids)[-1])[
            torch.arange(len(ids), device=ids.device), end
        ]
        return F.normalize(self.text_projection(pooled).float(), dim=-1)

    @torch.inference_mode()
    def embed_images(self, images: np.ndarray) -> Tensor:
        """Pictures (B, H, W, 3) uint8 → unit vectors (B, D) float32."""
        weight = self.visual_projection.weight
        return self.image_vectors(
            torch.from_numpy(preprocess(images, self.preprocessing)).to(weight.device, weight.dtype)
        )

    @torch.inference_mode()
    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        """Prompts → unit vectors (B, D) float32. Text beyond the tokenizer's length is cut."""
        return self.text_vectors(torch.tensor(self.tokenizer(prompts), device=self.text_projection.weight.device))

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> Tensor:
        """Cosine similarity (B,) of each picture (B, H, W, 3) uint8 with its own prompt, float32 in [-1, 1]."""
        if len(images) != len(prompts):
            raise UsageError(f"score: {len(images)} images for {len(prompts)} prompts")
        return (self.embed_images(images) * self.embed_texts(prompts)).sum(dim=-1)


def clip_component(found: ClipFolder) -> Component:
    """CLIP as it lies in a folder: ``skeleton`` tells whether all weights fit, ``load`` reads them."""
    return Component("clip", CLIP.of, found, found.weights, found.origins())
