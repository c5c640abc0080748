"""Textual inversion: learnt vectors that stand in the prompt as a token of their own (Gal et al. 2022).

A file holds n vectors of the text encoder's width d, in one of these layouts:

    diffusers    {"<token>": (d,) or (n, d)}
    web UIs      {"emb_params": (n, d)}, or, flattened from a pickle, {"string_to_param.*": (n, d)}
    SDXL         {"clip_l": (n, 768), "clip_g": (n, 1280)}, for its two text encoders

Where the file does not say the token, its own name is the token.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from sdbatch.diffusion.lora import read_tensors
from sdbatch.errors import ModelError

_ENCODERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
_NAMELESS = frozenset({"emb_params", "string_to_param", "string_to_param.*", "*"})
_FAMILIES = {768: "SD 1.x or SDXL's first encoder", 1024: "SD 2.x", 1280: "SDXL's second encoder"}


@dataclass(frozen=True)
class Embedding:
    """``token`` is what prompts call it; ``vectors`` are (n, d) in float32 for "text_encoder", "text_encoder_2"."""

    token: str
    vectors: dict[str, Tensor]


def read_embedding(path: Path) -> Embedding:
    """Raises ModelError for a pickle, an unreadable file and a layout that is none of the known."""
    tensors, _ = read_tensors(path, "embedding")
    # The flattened pickle also tells the token's id in the vocabulary it was trained with: nothing to us.
    named = {key: value for key, value in tensors.items() if not key.startswith("string_to_token")}
    if named and named.keys() <= _ENCODERS.keys():
        token, vectors = path.stem, {_ENCODERS[key]: _rows(path, key, value) for key, value in named.items()}
        if len({len(rows) for rows in vectors.values()}) > 1:
            raise ModelError(f"embedding {path} has another number of vectors for clip_l than for clip_g")
        return Embedding(token, vectors)
    if len(named) != 1:
        keys = ", ".join(list(named)[:3]) + (", …" if len(named) > 3 else "")
        raise ModelError(f"embedding {path} should hold the vectors of one token, but has {len(named)} keys: {keys}")
    (key, value), *_ = named.items()
    return Embedding(path.stem if key in _NAMELESS else key, {"text_encoder": _rows(path, key, value)})


def append_vectors(encoder: nn.Module, vectors: Tensor) -> int:
    """Give a text encoder n more tokens, ``vectors`` (n, d); returns the id of the first.

    Raises ModelError when the encoder is not d wide.
    """
    embedding = cast(nn.Embedding, encoder.get_submodule("text_model.embeddings.token_embedding"))
    old, width = embedding.weight, vectors.shape[1]
    if width != embedding.embedding_dim:
        family = f", for {_FAMILIES[width]}" if width in _FAMILIES else ""
        raise ModelError(
            f"the embedding's vectors are {width} wide{family}, but the text encoder is {embedding.embedding_dim} wide"
        )
    with torch.no_grad():
        embedding.weight = nn.Parameter(torch.cat([old, vectors.to(old)]), old.requires_grad)
    first = embedding.num_embeddings
    embedding.num_embeddings += len(vectors)
    return first


def _rows(path: Path, key: str, value: Tensor) -> Tensor:
    """(d,) or (n, d) → (n, d) float32."""
    if value.ndim not in {1, 2} or value.numel() == 0 or not value.is_floating_point():
        raise ModelError(f"embedding {path} has no vectors under {key}, but {tuple(value.shape)} of {value.dtype}")
    return value.float().reshape(-1, value.shape[-1])
