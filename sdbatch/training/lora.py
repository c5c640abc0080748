"""Low-rank adaptation (Hu et al. 2021, section 4.1): W stays as it is, beside it B·A learns what is new.

    y = W x + b + α/r · B (A x)        A (r, in), B (out, r)

Here α = r, so that the scale is 1 and files need not tell it. A branch is float32 whatever the layer's weights are:
steps as small as those of fine-tuning would be lost in bfloat16. Saved, the branches are a file in the layout of peft,
which diffusers loads with ``load_lora_weights`` and :class:`sdbatch.diffusion.Lora` names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdbatch.diffusion.unet import UNet
from sdbatch.diffusion.weights import DTYPES, write
from sdbatch.errors import UsageError

#: The projections of attention, which Hu et al. adapt (section 4.2), as each network calls them.
UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")

#: The name under which diffusers looks for a LoRA in a folder.
FILE_NAME = "pytorch_lora_weights.safetensors"


class LowRankLinear(nn.Module):
    """A linear layer, whose ``weight`` and ``bias`` keep their names, with a branch ``lora_A``, ``lora_B`` beside it.

    It computes what ``layer`` does until it learns: B starts as zeros, and A as the weights of a linear layer do.
    """

    def __init__(self, layer: nn.Linear, rank: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.weight = layer.weight
        self.bias: Tensor | None = layer.bias
        # Drawn on the CPU: a seed means the same weights on every device.
        down = torch.empty(rank, layer.in_features)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        up = torch.zeros(layer.out_features, rank)
        self.lora_A = nn.Parameter(down.to(layer.weight.device))
        self.lora_B = nn.Parameter(up.to(layer.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        branch = F.linear(F.linear(x.to(self.lora_A.dtype), self.lora_A), self.lora_B)
        return y + branch.to(y.dtype)


def add_lora(
    module: nn.Module, rank: int, targets: Sequence[str] | None = None, generator: torch.Generator | None = None
) -> dict[str, nn.Parameter]:
    """Freeze ``module`` and put a branch of ``rank`` beside each linear layer whose name ends with one of ``targets``.

    ``targets``: whole parts of names, such as "to_q" or "attn2.to_k"; None: the projections of the attention of a U-Net
    or of a text encoder. ``generator``, on the CPU, draws A; None: the one that ``torch.manual_seed`` seeds.

    Returns what is left to train, by name: "….lora_A" and "….lora_B", all float32. Every other key of
    ``module.state_dict()`` stays what it was. Raises UsageError, before anything is changed, for a rank below 1 and
    for a target that no linear layer is called.
    """
    if rank < 1:
        raise UsageError(f"a LoRA of rank {rank} can't be trained; choose a rank from 1 on")
    if targets is None:
        targets = UNET_TARGETS if isinstance(module, UNet) else TEXT_ENCODER_TARGETS
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    chosen = {target: [name for name in layers if f".{name}".endswith(f".{target}")] for target in targets}
    if homeless := [target for target, names in chosen.items() if not names]:
        kinds = sorted({".".join(name.split(".")[-2:]) for name in layers})
        raise UsageError(f"no linear layer is called {' or '.join(homeless)}; there are {', '.join(kinds) or 'none'}")
    wanted = {name for names in chosen.values() for name in names}
    module.requires_grad_(False)
    for name, layer in layers.items():
        if name in wanted:
            module.set_submodule(name, LowRankLinear(layer, rank, generator))
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def lora_state(networks: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The branches in the layout of peft: "unet.LAYER.lora_A.weight", "text_encoder.LAYER.lora_B.weight" and so on.

    ``networks``: "unet", "text_encoder" and, where the model has one, "text_encoder_2"; one without branches adds
    nothing. The tensors are the parameters themselves, detached, not copies.
    """
    return {
        f"{network}.{name}.{factor}.weight": getattr(layer, factor).detach()
        for network, module in networks.items()
        for name, layer in module.named_modules()
        if isinstance(layer, LowRankLinear)
        for factor in ("lora_A", "lora_B")
    }


def save_lora(folder: Path, networks: Mapping[str, nn.Module], *, dtype: str = "float32") -> Path:
    """Write the branches to ``folder``/pytorch_lora_weights.safetensors and return its path.

    ``networks``: as for :func:`lora_state`. ``dtype``: one of float32, float16, bfloat16.
    """
    path = folder / FILE_NAME
    write(path, lora_state(networks), DTYPES[dtype])
    return path
