"""Convolutions that a processor need not prepare anew at every step.

oneDNN's kernels want weights in blocks of the width of their vector units. torch lays them out so at every call: in a
U-Net as much work as a good part of the convolution itself, at small batches more. Here it is done once.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor, nn


class Conv2d(nn.Conv2d):
    """torch's convolution; where ``packs`` is set, its weights are laid out once for an input shape.

    It computes what it does without, to the last bit, for torch gives the same kernel the same numbers; but for single
    small inputs, for which torch has one of its own.
    """

    packs = False
    _packed: Any = None  # weights as the kernel wants them
    _packed_for: tuple[Any, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        if not self.packs or torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return super().forward(x)
        weight = self.weight  # which may have changed since, in place or for another
        wanted = x.shape, weight.data_ptr(), 0 if weight.is_inference() else weight._version
        if self._packed_for != wanted:
            if not _has_kernels(weight):  # it has moved since
                return super().forward(x)
            self._packed = torch.ops.mkldnn_prepacked.conv2d_prepack(
                weight, self.bias, self.stride, self.padding, self.dilation, self.groups, x.shape, "none"
            )
            self._packed_for = wanted
        result: Tensor = torch.ops.mkldnn_prepacked.conv2d_run(x, self._packed)
        return result

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None, "_packed_for": ()}


def pack_convolutions(network: nn.Module) -> None:
    """Have a network on the CPU keep its convolutions' weights laid out, beside those it has, where it can."""
    for module in _packable(network):
        module.packs = True


def packed_bytes(network: nn.Module) -> int:
    """What ``pack_convolutions`` takes of memory."""
    return sum(module.weight.nbytes for module in _packable(network))


def _packable(network: nn.Module) -> list[Conv2d]:
    return [module for module in network.modules() if isinstance(module, Conv2d) and _has_kernels(module.weight)]


def _has_kernels(weight: Tensor) -> bool:
    """Does this machine's torch have such kernels for weights of this format and place?"""
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not available or platform.machine() not in {"x86_64", "AMD64"} or weight.device.type not in {"cpu", "meta"}:
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
