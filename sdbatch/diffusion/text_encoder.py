"""CLIP's text encoder: a causal transformer over token ids (Radford et al. 2021, section 2.4).

The module tree carries the key names of transformers' ``CLIPTextModel`` and ``CLIPTextModelWithProjection``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class TextEncoderConfig:
    """Sizes of the text encoder. The defaults are those of CLIP ViT-L/14, which SD 1.x uses."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"  # or "gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int | None = None  # width of the text's embedding, for encoders that have one


class Sizes(Protocol):
    """What both of CLIP's encoders say of their layers."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def hidden_act(self) -> str: ...
    @property
    def layer_norm_eps(self) -> float: ...


class SelfAttention(nn.Module):
    def __init__(self, config: Sizes, *, causal: bool) -> None:
        super().__init__()
        width = config.hidden_size
        if width % config.num_attention_heads:
            raise ValueError(f"{width} channels can't be shared among {config.num_attention_heads} attention heads")
        self.heads, self.causal = config.num_attention_heads, causal
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, L, d)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        h = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(h.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, config: Sizes) -> None:
        super().__init__()
        self.quick = config.hidden_act == "quick_gelu"
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        h = h * torch.sigmoid(1.702 * h) if self.quick else F.gelu(h)
        return self.fc2(h)


class EncoderLayer(nn.Module):
    def __init__(self, config: Sizes, *, causal: bool) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config, causal=causal)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = FeedForward(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """CLIP's stack of layers; in the text encoder (``causal``) a token sees only what stands before it."""

    def __init__(self, config: Sizes, *, causal: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config, causal=causal) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> list[Tensor]:
        """The states that go in and those after each layer, each (B, L, hidden_size)."""
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return states


class Embeddings(nn.Module):
    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class TextTransformer(nn.Module):
    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config, causal=True)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, ids: Tensor) -> list[Tensor]:
        return self.encoder(self.embeddings(ids))


class TextEncoder(nn.Module):
    """Token ids (B, L) int64 → states of every layer and, through ``pool``, one embedding a text."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = TextTransformer(config)
        width = config.hidden_size
        self.text_projection = nn.Linear(width, config.projection_dim, bias=False) if config.projection_dim else None

    def forward(self, ids: Tensor) -> list[Tensor]:
        """States after the embeddings and after each layer, each (B, L, hidden_size), not normalised."""
        return self.text_model(ids)

    def normalise(self, states: Tensor) -> Tensor:
        return self.text_model.final_layer_norm(states)

    def pool(self, states: Tensor, ids: Tensor, eos_id: int) -> Tensor:
        """The projected state (B, projection_dim) of each text's first end-of-text token, from the last layer."""
        ends = (ids == eos_id).int().argmax(dim=1)
        pooled = self.normalise(states)[torch.arange(len(ids), device=ids.device), ends]
        return pooled if self.text_projection is None else self.text_projection(pooled)
