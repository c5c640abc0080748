"""Folders in which transformers saves CLIP, and diffusers its safety checker: found and read, weights not loaded yet.

FOLDER/config.json                  both encoders' sizes
       model.safetensors            or the files that model.safetensors.index.json lists, or model.fp16.safetensors
       preprocessor_config.json     optional; newer releases of transformers put it into processor_config.json
       vocab.json, merges.txt       or tokenizer.json; a safety checker has none
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from sdbatch.diffusion.configs import plausible, understanding
from sdbatch.diffusion.folder import find_weights
from sdbatch.diffusion.image_encoder import ImageEncoderConfig, Preprocessing
from sdbatch.diffusion.text_encoder import TextEncoderConfig
from sdbatch.diffusion.tokenizer import CLIPTokenizer, read_tokenizer
from sdbatch.diffusion.weights import Origin, Weights
from sdbatch.errors import ModelError

_TEXTS = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class ClipFolder:
    """What lies in such a folder."""

    path: Path
    text: TextEncoderConfig
    image: ImageEncoderConfig
    projection_dim: int
    preprocessing: Preprocessing
    weights: Weights

    def tokenizer(self) -> CLIPTokenizer:
        """Raises ModelError where there is none, or it is another encoder's."""
        tokenizer = read_tokenizer(self.path)
        highest, positions = max(tokenizer.vocab.values()), self.text.max_position_embeddings
        if highest >= self.text.vocab_size:
            size = self.text.vocab_size
            raise ModelError(f"model folder {self.path}: the tokenizer's ids go up to {highest}, vocab_size is {size}")
        if tokenizer.max_length <= positions:
            return tokenizer
        # A tokenizer that was saved without a length has an astronomical one.
        return CLIPTokenizer(tokenizer.vocab, tokenizer.merges, max_length=positions, pad_token=tokenizer.pad_token)

    def origins(self) -> dict[str, Origin]:
        """The key that a network has for each weight. Older releases wrapped the image encoder once more."""
        inner = "vision_model.vision_model."
        keys = {
            key: f"vision_model.{key.removeprefix(inner)}" if key.startswith(inner) else key
            for key in self.weights.shapes
        }
        # Numbers that a buffer of older releases counted up; they say nothing.
        return {ours: Origin(key) for key, ours in keys.items() if not ours.endswith(".embeddings.position_ids")}

    def fingerprint(self) -> str:
        """sha256 over the contents of all files that decide what is computed, and what pictures go through before."""
        files = {name: self.path / name for name in ("config.json", *_TEXTS)}
        files |= {path.name: path for path in self.weights.files}
        digest = hashlib.sha256(repr(dataclasses.astuple(self.preprocessing)).encode())
        for name, path in sorted(files.items()):
            if path.is_file():
                with path.open("rb") as file:
                    digest.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        return digest.hexdigest()


def read_clip_folder(folder: Path) -> ClipFolder:
    """What lies in ``folder``. Raises ModelError where a file is missing or asks for what is not done here.

    A safety checker's preprocessing is in ``feature_extractor/`` beside it, as Stable Diffusion's folders have it.
    """
    path = folder / "config.json"
    with understanding(path, {}) as raw:
        # Where older releases wrote a "…_config_dict" as well, transformers goes by that one.
        text, image = (raw.get(f"{half}_config_dict") or raw.get(f"{half}_config") or {} for half in ("text", "vision"))
        for name, half in (("text_config", text), ("vision_config", image)):
            if half.get("hidden_act", "quick_gelu") not in {"quick_gelu", "gelu"}:
                raise ModelError(f"model file {path}: {name}: hidden_act '{half['hidden_act']}' is not supported")
        of_text, of_image = plausible(_replace(_BASE_TEXT, text)), plausible(_replace(_BASE_IMAGE, image))
        width = raw.get("projection_dim", _BASE_PROJECTION_DIM)
        if type(width) is not int or not 0 < width <= _MOST_DIMENSIONS:
            raise ValueError(f"projection_dim is {width!r:.100}")
    processor = _processor(folder)
    preprocessing = Preprocessing(of_image.image_size, of_image.image_size)
    if processor is not None:
        with understanding(processor, {}) as raw:
            settings = raw.get("image_processor", {}) if processor.name == "processor_config.json" else raw
            preprocessing = _preprocessing(processor, settings, of_image.image_size)
    weights = find_weights(folder, "model")
    return ClipFolder(folder, of_text, of_image, width, preprocessing, weights)


# -- what stands in the files ------------------------------------------------------------------------------

_Config = TypeVar("_Config", TextEncoderConfig, ImageEncoderConfig)

# transformers leaves out of config.json what is as in CLIP ViT-B/32.
_BASE_TEXT = TextEncoderConfig(hidden_size=512, intermediate_size=2048, num_attention_heads=8)
_BASE_IMAGE = ImageEncoderConfig(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=32
)
_BASE_PROJECTION_DIM = 512
_MOST_DIMENSIONS = 1_000_000


def _replace(base: _Config, raw: Mapping[str, Any]) -> _Config:
    # The projection is beside the encoders here.
    names = [field.name for field in dataclasses.fields(base) if field.name != "projection_dim"]
    return dataclasses.replace(base, **{name: raw[name] for name in names if name in raw})


def _processor(folder: Path) -> Path | None:
    places = [folder / name for name in _PROCESSORS]
    if folder.name == "safety_checker":
        places.append(folder.parent / "feature_extractor" / _PROCESSORS[0])
    return next((path for path in places if path.is_file()), None)


def _preprocessing(path: Path, raw: Mapping[str, Any], image_size: int) -> Preprocessing:
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
    colours = [float(number) for number in (*mean, *std)]
    if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, colours)) or min(colours[3:]) <= 0:
        raise ValueError("image_mean and image_std should be three numbers each, those of image_std above 0")
    return Preprocessing(edge["shortest_edge"], image_size, tuple(mean), tuple(std))
