"""What makes a model faster, one technique a row of the waterfall."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend as Backend

from sdbatch.bench.subject import Subject
from sdbatch.diffusion.compilation import compile_blocks
from sdbatch.diffusion.compilation import lacking as compiler_lacking
from sdbatch.diffusion.float8 import lacking as float8_lacking
from sdbatch.diffusion.float8 import transformers_to_float8
from sdbatch.diffusion.unet import Attention, KeysValues, TransformerBlock


@dataclass(frozen=True)
class Technique:
    """``apply`` changes a model that was just loaded; ``lacking`` tells why that can't be done here, if so."""

    name: str
    apply: Callable[[Subject], None]
    lacking: Callable[[Subject], str | None] = lambda subject: None
    of: str | None = None  # one of several ways to do the same, of which a model can have one
    coarser: bool = False  # numbers with fewer digits, so that pictures may suffer


class FusedAttention(nn.Module):
    """Self-attention whose queries, keys and values come from one product."""

    weight: Tensor

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.heads = attention.heads
        self.to_out = attention.to_out
        weights = [layer.weight for layer in (attention.to_q, attention.to_k, attention.to_v)]
        self.register_buffer("weight", torch.cat(weights))

    def forward(self, x: Tensor, text: KeysValues | None = None) -> Tensor:
        b, length, width = x.shape
        h = F.linear(x, self.weight).view(b, length, 3, self.heads, width // self.heads)
        q, k, v = h.permute(2, 0, 3, 1, 4)  # each (B, heads, h·w, d)
        h = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](h.transpose(1, 2).flatten(2))


def read_texts_once(subject: Subject) -> None:
    subject.texts_once, subject.keeps_texts = True, 256


def tell_texts_once(subject: Subject) -> None:
    subject.keys_values_once = True


def channels_last(part: str, subject: Subject) -> None:
    subject.networks()[part].to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def fuse(subject: Subject) -> None:
    for block in subject.modules_of(TransformerBlock):
        block.attn1 = FusedAttention(block.attn1)


def attend_by(backend: Backend, subject: Subject) -> None:
    subject.attention = backend


def slice_vae(subject: Subject) -> None:
    subject.vae_slicing = True


def vae_as_unet(subject: Subject) -> None:
    subject.vae.to(subject.dtype)


def compile_whole(subject: Subject, mode: str | None = None) -> None:
    subject.unet.compile(fullgraph=True, dynamic=False, mode=mode)
    subject.vae._decode = torch.compile(subject.vae._decode, dynamic=False)  # type: ignore[method-assign]


def float8(subject: Subject) -> None:
    transformers_to_float8(subject.unet)


def _without_cuda(subject: Subject) -> str | None:
    return None if subject.device.type == "cuda" else "needs a CUDA device"


def _without_float8(subject: Subject) -> str | None:
    return float8_lacking(subject.device.type)


def _without_compiler(subject: Subject) -> str | None:
    return compiler_lacking(subject.device.type)


def _vae_is_alike(subject: Subject) -> str | None:
    same = next(subject.vae.parameters()).dtype == subject.dtype
    return "the VAE computes as the U-Net does already" if same else None


#: How jobs compile, with ``model.compile``.
BLOCKS = Technique("compiled block by block", compile_blocks, _without_compiler, of="compiler")
#: In the order in which they are added; each stays when it makes pictures faster.
TECHNIQUES = (
    Technique("text once a distinct prompt", read_texts_once),
    Technique("keys and values once a prompt", tell_texts_once),
    Technique("channels last: VAE", partial(channels_last, "vae")),
    Technique("channels last: U-Net", partial(channels_last, "unet")),
    Technique("fused QKV", fuse),
    Technique("attention: plain", partial(attend_by, Backend.MATH), of="attention"),
    Technique("attention: flash", partial(attend_by, Backend.FLASH_ATTENTION), of="attention"),
    Technique("attention: efficient", partial(attend_by, Backend.EFFICIENT_ATTENTION), _without_cuda, of="attention"),
    Technique("attention: cuDNN", partial(attend_by, Backend.CUDNN_ATTENTION), _without_cuda, of="attention"),
    Technique("VAE in the U-Net's format", vae_as_unet, _vae_is_alike, coarser=True),
    Technique("VAE picture by picture", slice_vae),
    BLOCKS,
    Technique("compiled as a whole", compile_whole, _without_compiler, of="compiler"),
    Technique("CUDA graphs", partial(compile_whole, mode="reduce-overhead"), _without_cuda, of="compiler"),
    Technique("float8 linear layers", float8, _without_float8, coarser=True),
)


def as_in_jobs(device: str, *, compiled: bool = False) -> tuple[Technique, ...]:
    """What jobs do: ``LatentDiffusion`` by itself, and with ``model.compile`` as far as that can be had here."""
    own = TECHNIQUES[: 4 if device == "cuda" else 3]
    return (*own, BLOCKS) if compiled and compiler_lacking(device) is None else own
