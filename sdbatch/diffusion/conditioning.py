"""From prompts to what the U-Net is told of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sdbatch.diffusion.prompt import read_prompts
from sdbatch.diffusion.text_encoder import TextEncoder
from sdbatch.diffusion.tokenizer import CLIPTokenizer
from sdbatch.diffusion.unet import Added, KeysValues
from sdbatch.errors import UsageError


@dataclass(frozen=True)
class Conditioning:
    """What the U-Net is told of a batch of prompts."""

    states: Tensor  # (B, L, D) text states
    added: Added | None  # SDXL
    keys_values: list[KeysValues] | None = None  # of the U-Net's cross-attentions, once they are made

    def blanked(self, given: Tensor) -> Conditioning:
        """Text only where ``given`` (B,) is True, zeros elsewhere: how SDXL has an empty prompt."""
        added = self.added
        if added is not None:
            added = Added(added.pooled * given[:, None], added.sizes)
        return Conditioning(self.states * given[:, None, None], added)

    def __add__(self, other: Conditioning) -> Conditioning:
        """Both batches as one."""
        added = None
        if self.added is not None and other.added is not None:
            pooled = torch.cat([self.added.pooled, other.added.pooled])
            added = Added(pooled, torch.cat([self.added.sizes, other.added.sizes]))
        return Conditioning(torch.cat([self.states, other.states]), added)


@dataclass(frozen=True)
class Reading:
    """How prompts are read."""

    long_prompts: Literal["truncate", "chunk"] = "truncate"  # beyond what the text encoder reads: cut, or in chunks
    emphasis: bool = False  # (word:1.2) weighs; else brackets are ordinary characters
    clip_skip: int = 0  # layers of the text encoder to leave out at its end, in prompts but not in negative ones


def sent(values: Sequence[Any] | Tensor, device: torch.device) -> Tensor:
    """Numbers as a tensor on the device. From pinned memory the copy does not wait for what the device is still at."""
    if device.type == "cuda":
        return torch.as_tensor(values).pin_memory().to(device, non_blocking=True)
    return torch.as_tensor(values, device=device)


def text_states(
    tokenizer: CLIPTokenizer,
    encoder: TextEncoder,
    prompts: Sequence[str],
    reading: Reading,
    *,
    chunks: int,
    skip: int,
    penultimate: bool,
) -> tuple[Tensor, Tensor]:
    """States (B, chunks · L, D) of the prompts and, of their first chunk, the pooled embedding (B, P).

    The last layer's states, normalised, or those of the layer before it as they are (``penultimate``), and ``skip``
    layers before that. Raises UsageError where a prompt that is to be read whole takes more than ``chunks``.
    """
    reads = read_prompts(tokenizer, prompts, chunked=reading.long_prompts == "chunk", emphasis=reading.emphasis)
    most = max(len(read.chunks) for read in reads)
    if most > chunks:
        raise UsageError(f"encode: a prompt takes {most} chunks of {tokenizer.room} tokens, but chunks is {chunks}")
    device = encoder.text_model.final_layer_norm.weight.device
    rows = [(read.chunks + [tokenizer.frame([])] * chunks)[:chunks] for read in reads]
    ids = sent(rows, device).flatten(0, 1)  # (B · chunks, L)
    layers = encoder(ids)
    back = skip + (2 if penultimate else 1)
    if back >= len(layers):
        raise UsageError(f"encode: clip_skip is {skip}, but the text encoder has {len(layers) - 1} layers")
    states = layers[-back] if penultimate else encoder.normalise(layers[-back])
    pooled = encoder.pool(layers[-1], ids, tokenizer.eos_id).reshape(len(prompts), chunks, -1)[:, 0]
    weighted = [read.weighted for read in reads]
    if any(weighted):
        blank = [1.0] * tokenizer.max_length
        weights = sent([(read.weights + [blank] * chunks)[:chunks] for read in reads], device)
        heavier = states * weights.flatten(0, 1)[:, :, None].to(states.dtype)
        heavier = heavier * _mean_ratio(states, heavier).to(states.dtype)
        chosen = sent(weighted, device).repeat_interleave(chunks)[:, None, None]
        states = torch.where(chosen, heavier, states)
    return states.reshape(len(prompts), -1, states.shape[-1]), pooled


def _mean_ratio(states: Tensor, heavier: Tensor) -> Tensor:
    """(B, 1, 1): emphasis moves states (B, L, D) about but leaves their mean, as image UIs have it.

    A mean of next to nothing, or one that has changed its sign, can't be restored by a factor.
    """
    before, after = (x.float().mean(dim=(1, 2), keepdim=True) for x in (states, heavier))
    least = 1e-3 * states.float().abs().mean(dim=(1, 2), keepdim=True)
    return torch.where((before * after > 0) & (before.abs().minimum(after.abs()) > least), before / after, 1.0)
