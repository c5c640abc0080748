"""Linear layers in eight bits: float8 (e4m3) weights and activations, each row with a scale of its own.

Half the bytes and, on GPUs that have it (compute capability 8.9 and later), twice the rate of bfloat16. Pictures
change, so nothing here is done unless it is asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sdbatch.diffusion.unet import TransformerBlock

_MOST = torch.finfo(torch.float8_e4m3fn).max


class Float8Linear(nn.Module):
    """x (…, in) → (…, out) in x's own format, from a linear layer whose weight is rounded to float8."""

    weight: Tensor  # (out, in)
    scale: Tensor  # (1, out)

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight, scale = _rounded(layer.weight)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.T)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = _rounded(x.flatten(0, -2))
        # The product is only made in bfloat16.
        h = torch._scaled_mm(rows, self.weight.T, scale_a=scale, scale_b=self.scale, out_dtype=torch.bfloat16)
        h = h.to(x.dtype).reshape(*x.shape[:-1], -1)
        return h if self.bias is None else h + self.bias


def lacking(device: str) -> str | None:
    """Why ``device``, cpu or cuda, can't compute so on this machine; None where it can."""
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        return "needs a GPU of compute capability 8.9 or later, and there is an older one"
    try:
        Float8Linear(nn.Linear(16, 16, device=device))(torch.ones(1, 16, device=device))
    except (RuntimeError, NotImplementedError):
        return "needs float8 products, which torch does not have for this device"
    return None


def transformers_to_float8(network: nn.Module) -> None:
    """The linear layers of all transformer blocks: nearly all of the U-Net's, and those that bear it best."""
    for block in [module for module in network.modules() if isinstance(module, TransformerBlock)]:
        to_float8(block)


def to_float8(network: nn.Module) -> int:
    """Replace the linear layers of a network whose sides the product takes, multiples of 16; returns how many."""
    count = 0
    for parent in list(network.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Linear) and layer.in_features % 16 == layer.out_features % 16 == 0:
                setattr(parent, name, Float8Linear(layer))
                count += 1
    return count


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (N, K) in float8, and what each has to be multiplied by (N, 1), float32."""
    scale = rows.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / _MOST
    return (rows / scale).to(torch.float8_e4m3fn), scale
