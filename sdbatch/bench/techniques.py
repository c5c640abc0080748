"""What makes a model faster, one technique a row of the waterfall."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend as Backend

from sdbatch.bench.clock import Setting
from sdbatch.bench.subject import Subject
from sdbatch.diffusion.checkpoint import Checkpoint
from sdbatch.diffusion.compilation import compile_blocks
from sdbatch.diffusion.compilation import lacking as compiler_lacking
from sdbatch.diffusion.convolution import pack_convolutions
from sdbatch.diffusion.float8 import lacking as float8_lacking
from sdbatch.diffusion.float8 import transformers_to_float8
from sdbatch.diffusion.pipeline import vae_dtype
from sdbatch.diffusion.unet import Attention, KeysValues, TransformerBlock
from sdbatch.diffusion.weights import DTYPES


@dataclass(frozen=True)
class Technique:
    """``apply`` changes a model that was just loaded; ``lacking`` tells why that can't be done here, if so.

    Jobs work so ``always`` on these devices, or where a ``field`` of their spec says so; else no job can.
    """

    name: str
    apply: Callable[[Subject], None]
    lacking: Callable[[Checkpoint, Setting], str | None] = lambda checkpoint, setting: None
    of: str | None = None  # one of several ways to do the same, of which a model can have one
    coarser: bool = False  # numbers with fewer digits, so that pictures may suffer
    always: tuple[str, ...] = ()
    field: str | None = None

    def in_jobs(self, device: str) -> bool:
        """Can a job on such a device work so?"""
        return device in self.always or self.field is not None


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
    subject.texts_once, subject.texts.keeps = True, 256


def tell_texts_once(subject: Subject) -> None:
    subject.keys_values_once = True


def channels_last(part: str, subject: Subject) -> None:
    subject.networks()[part].to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def pack(subject: Subject) -> None:
    pack_convolutions(subject.unet)


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


def _without_cuda(checkpoint: Checkpoint, setting: Setting) -> str | None:
    return None if setting.device == "cuda" else "needs a CUDA device"


def _without_cpu(checkpoint: Checkpoint, setting: Setting) -> str | None:
    return None if setting.device == "cpu" else "is for the CPU"


def _without_float8(checkpoint: Checkpoint, setting: Setting) -> str | None:
    return float8_lacking(setting.device)


def _without_compiler(checkpoint: Checkpoint, setting: Setting) -> str | None:
    return compiler_lacking(setting.device)


def _vae_is_alike(checkpoint: Checkpoint, setting: Setting) -> str | None:
    kind = DTYPES[setting.dtype]
    same = vae_dtype(checkpoint.vae.config, kind) == kind
    return "the VAE computes as the U-Net does already" if same else None


_DEVICES = ("cpu", "cuda")

#: In the order in which they are added; each stays when it makes pictures faster and jobs can use it.
TECHNIQUES = (
    Technique("text once a distinct prompt", read_texts_once, always=_DEVICES),
    Technique("keys and values once a prompt", tell_texts_once, always=_DEVICES),
    Technique("channels last: VAE", partial(channels_last, "vae"), always=_DEVICES),
    Technique("convolutions packed: U-Net", pack, _without_cpu, always=("cpu",)),
    Technique("channels last: U-Net", partial(channels_last, "unet"), always=("cuda",)),
    Technique("fused QKV", fuse),
    Technique("attention: plain", partial(attend_by, Backend.MATH), of="attention"),
    Technique("attention: flash", partial(attend_by, Backend.FLASH_ATTENTION), of="attention"),
    Technique("attention: efficient", partial(attend_by, Backend.EFFICIENT_ATTENTION), _without_cuda, of="attention"),
    Technique("attention: cuDNN", partial(attend_by, Backend.CUDNN_ATTENTION), _without_cuda, of="attention"),
    Technique("VAE in the U-Net's format", vae_as_unet, _vae_is_alike, coarser=True),
    Technique("VAE picture by picture", slice_vae, field="model.vae_slicing"),
    Technique("compiled block by block", compile_blocks, _without_compiler, of="compiler", field="model.compile"),
    Technique("compiled as a whole", compile_whole, _without_compiler, of="compiler"),
    Technique("CUDA graphs", partial(compile_whole, mode="reduce-overhead"), _without_cuda, of="compiler"),
    Technique("float8 linear layers", float8, _without_float8, coarser=True, field="model.fp8"),
)


def as_in_jobs(device: str, *fields: str) -> tuple[Technique, ...]:
    """What a job does, with these fields of its spec set."""
    return tuple(one for one in TECHNIQUES if device in one.always or one.field in fields)
