"""CLIP: an image encoder beside the text encoder, and how well a picture fits its prompt (Radford et al. 2021).

The module tree carries the key names of transformers' ``CLIPModel``, whose folder layout is read:

FOLDER/config.json                  both encoders' sizes
       model.safetensors
       preprocessor_config.json     optional; newer releases of transformers put it into processor_config.json
       vocab.json, merges.txt       or tokenizer.json
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from sdbatch.diffusion.folder import read_json, text_json, write_json
from sdbatch.diffusion.text_encoder import Encoder, TextEncoder, TextEncoderConfig
from sdbatch.diffusion.tokenizer import CLIPTokenizer, read_tokenizer, write_tokenizer
from sdbatch.diffusion.weights import DTYPES, Origin, Weights, assign, check, skeletons, write
from sdbatch.errors import ModelError, UsageError


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


# -- the image encoder -----------------------------------------------------------------------------------


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


# -- pictures and prompts in one space -------------------------------------------------------------------


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
        folder = Path(folder)
        text, image, projection_dim = _read_config(folder / "config.json")
        tokenizer = _read_tokenizer(folder, text)
        preprocessing = _read_preprocessing(folder, image.image_size)
        path = folder / "model.safetensors"
        if not path.is_file():
            raise ModelError(f"model file {path} is missing (only .safetensors weights are read)")
        with skeletons():
            clip = cls(tokenizer, text, image, projection_dim, preprocessing)
        stored, wanted = Weights([path]), clip.state_dict()
        origins = {key: Origin(key) for key in wanted}
        check(clip, stored, origins, [key for key in stored.shapes.keys() - wanted.keys() if key not in _IGNORED])
        assign(clip, stored, origins, device, DTYPES[dtype])
        return clip

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


# -- reading ---------------------------------------------------------------------------------------------

_Config = TypeVar("_Config", TextEncoderConfig, ImageEncoderConfig)

# transformers leaves out of config.json what is as in CLIP ViT-B/32.
_BASE_TEXT = TextEncoderConfig(hidden_size=512, intermediate_size=2048, num_attention_heads=8)
_BASE_IMAGE = ImageEncoderConfig(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=32
)
_BASE_PROJECTION_DIM = 512

# Numbers that a buffer of older releases counted up; they say nothing.
_IGNORED = frozenset({"text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"})


def _read_config(path: Path) -> tuple[TextEncoderConfig, ImageEncoderConfig, int]:
    raw = read_json(path)
    # Where older releases wrote a "…_config_dict" as well, transformers goes by that one.
    text, image = (raw.get(f"{half}_config_dict") or raw.get(f"{half}_config") or {} for half in ("text", "vision"))
    for name, half in (("text_config", text), ("vision_config", image)):
        if half.get("hidden_act", "quick_gelu") not in {"quick_gelu", "gelu"}:
            raise ModelError(f"model file {path}: {name}: hidden_act '{half['hidden_act']}' is not supported")
    return _replace(_BASE_TEXT, text), _replace(_BASE_IMAGE, image), raw.get("projection_dim", _BASE_PROJECTION_DIM)


def _replace(base: _Config, raw: Mapping[str, Any]) -> _Config:
    names = [field.name for field in dataclasses.fields(base)]
    return dataclasses.replace(base, **{name: raw[name] for name in names if name in raw})


def _read_preprocessing(folder: Path, image_size: int) -> Preprocessing:
    """From preprocessor_config.json or processor_config.json, CLIP's own where neither is there."""
    path, raw = folder / "preprocessor_config.json", {}
    if path.is_file():
        raw = read_json(path)
    elif (path := folder / "processor_config.json").is_file():
        raw = read_json(path).get("image_processor", {})
    steps = dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), True)
    # Older releases wrote one number where newer ones write an object.
    edge, crop = raw.get("size", image_size), raw.get("crop_size", image_size)
    edge = edge if isinstance(edge, dict) else {"shortest_edge": edge}
    crop = crop if isinstance(crop, dict) else {"height": crop, "width": crop}
    done = {**steps, "resample": Image.Resampling.BICUBIC.value, "rescale_factor": 1 / 255}
    odd = [f"{name} {raw[name]}" for name, value in done.items() if raw.get(name, value) != value]
    odd += [f"crop_size {crop}"] if crop != {"height": image_size, "width": image_size} else []
    odd += [f"size {edge}"] if edge.keys() != {"shortest_edge"} or edge["shortest_edge"] < image_size else []
    if odd:
        raise ModelError(f"model file {path}: for an image encoder of {image_size} pixels not supported: {odd[0]}")
    mean, std = raw.get("image_mean", Preprocessing.mean), raw.get("image_std", Preprocessing.std)
    return Preprocessing(edge["shortest_edge"], image_size, tuple(mean), tuple(std))


def _read_tokenizer(folder: Path, text: TextEncoderConfig) -> CLIPTokenizer:
    tokenizer = read_tokenizer(folder)
    highest = max(tokenizer.vocab.values())
    if highest >= text.vocab_size:
        raise ModelError(
            f"model folder {folder}: the tokenizer's ids go up to {highest}, vocab_size is {text.vocab_size}"
        )
    if tokenizer.max_length <= text.max_position_embeddings:
        return tokenizer
    # A tokenizer that was saved without a length has an astronomical one.
    return CLIPTokenizer(
        tokenizer.vocab, tokenizer.merges, max_length=text.max_position_embeddings, pad_token=tokenizer.pad_token
    )
