"""Low-rank adapters, merged into the networks when they are loaded (Hu et al. 2021, section 4.1).

W' = W + s·(α/r)·B·A: A (r, in) leads down to rank r, B (out, r) up again; s is the user's weight. A convolution's
A is (r, in, kh, kw) and its B (out, r, 1, 1). Three layouts are read, here for the layer LAYER of the U-Net:

    peft                 unet.LAYER.lora_A.weight, .lora_B.weight; α in the file's metadata or in unet.LAYER.alpha
    diffusers before it  unet.LAYER.lora.down.weight, .up.weight, or, of attention, processor.to_q_lora.down.weight
    kohya                lora_unet_LAYER.lora_down.weight, .lora_up.weight, .alpha, with LAYER's dots as underscores
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from sdbatch.errors import ModelError

Layers = Mapping[str, nn.Linear | nn.Conv2d]  # by network and path, such as "unet.conv_in"

_FACTOR = re.compile(
    r"(.+?)[._](lora_A|lora_B|lora_down|lora_up|lora(?:_linear_layer)?\.(?:down|up))(\.[^.]+)?\.weight"
)
_ALPHA = re.compile(r"(.+?)([._]lora(_linear_layer)?)?\.alpha")
_KOHYA = {"unet": ("lora_unet",), "text_encoder": ("lora_te", "lora_te1"), "text_encoder_2": ("lora_te2",)}
_OTHER_KINDS = {
    "hada_w": "LoHa",
    "lokr_w": "LoKr",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_mid": "LoCon with a Tucker core",
}
_ANOTHER_FAMILY = "it was probably made for another model family"


@dataclass(frozen=True)
class Adapter:
    """The factors of one layer: ``down`` is A, ``up`` is B, ``scale`` is α/r."""

    down: Tensor
    up: Tensor
    scale: float

    def delta(self) -> Tensor:
        """α/r·B·A in float32, (out, in) or (out, in·kh·kw)."""
        return self.scale * (self.up.float().flatten(1) @ self.down.float().flatten(1))


def merge_lora(networks: Mapping[str, nn.Module], path: Path, weight: float, aliases: Mapping[str, str] = {}) -> int:
    """Add a LoRA file, ``weight`` times, to the layers it was trained for; returns how many these are.

    ``networks``: "unet", "text_encoder" and, where the model has one, "text_encoder_2". ``aliases``: the U-Net's
    layers in the original code's names → in ours. Raises ModelError, before any layer is changed, when a tensor of
    the file has no place in the networks.
    """
    tensors, metadata = read_tensors(path, "LoRA")
    layers: Layers = {
        f"{network}.{name}": layer
        for network, module in networks.items()
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }
    adapters = _adapters(path, tensors, metadata, layers, _spellings(layers, aliases))
    with torch.no_grad():
        for name, adapter in adapters.items():
            old = layers[name].weight
            delta = adapter.delta().to(old.device).view_as(old)
            # A new parameter: the old one may be a read-only view of the checkpoint's file.
            layers[name].weight = nn.Parameter((old.float() + weight * delta).to(old.dtype), old.requires_grad)
    return len(adapters)


def read_tensors(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a .safetensors file, or a ModelError that begins with ``what`` it should be."""
    if path.suffix in {".pt", ".pth", ".bin", ".ckpt"}:
        raise ModelError(f"{what} {path} is a pickle, which can run code when opened; convert it to .safetensors")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise ModelError(f"{what} {path} can't be read: {error}") from None


def _adapters(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], layers: Layers, spellings: Mapping[str, str]
) -> dict[str, Adapter]:
    """Every layer's adapter, by the layer's name, once all keys and shapes are known to fit."""
    for key in tensors:
        for mark, kind in _OTHER_KINDS.items():
            if mark in key:
                raise ModelError(f"LoRA {path} is of a kind that is not supported, {kind}, as its key {key} tells")
        whole = _ALPHA.fullmatch(key) is not None  # an alpha may be a whole number
        if not (whole or tensors[key].is_floating_point()) or not tensors[key].isfinite().all():
            raise ModelError(f"LoRA {path} can't be used: {key} should hold finite floating-point numbers")
    parts: dict[str, dict[str, Tensor]] = {}  # layer → "down", "up", "alpha"
    strange, homeless = [], []
    for key, tensor in tensors.items():
        if factor := _FACTOR.fullmatch(key):
            part = "down" if factor[2].endswith(("down", "A")) else "up"
        elif factor := _ALPHA.fullmatch(key):
            part = "alpha"
        else:
            strange.append(key)
            continue
        name = spellings.get(factor[1].replace("base_model.model.", "").replace(".processor", ""))
        if name is None:
            homeless.append(key)
        elif part in parts.setdefault(name, {}):
            raise ModelError(f"LoRA {path} has a second '{part}' tensor for the layer {name}: {key}")
        else:
            parts[name][part] = tensor
    if homeless:
        raise ModelError(
            f"LoRA {path} has {_some(homeless)} for layers that the model does not have; {_ANOTHER_FAMILY}"
        )
    if strange:
        raise ModelError(f"LoRA {path} has {_some(strange)} where only low-rank factors and their alphas can be read")
    if not parts:
        raise ModelError(f"LoRA {path} is empty")
    trained = _trained(path, metadata)
    return {name: _adapter(path, name, layers[name].weight, part, trained) for name, part in parts.items()}


def _adapter(path: Path, name: str, weight: Tensor, parts: Mapping[str, Tensor], trained: Mapping[str, Any]) -> Adapter:
    if missing := {"down", "up"} - parts.keys():
        raise ModelError(f"LoRA {path} lacks the '{min(missing)}' factor of the layer {name}")
    down, up = parts["down"], parts["up"]
    rank = down.shape[0] if down.ndim else 0
    # A linear layer and a 1×1 convolution are the same map: either may hold factors trained for the other.
    wanted = ((rank, *_kernel(weight)[1:]), (weight.shape[0], rank, 1, 1))
    if rank == 0 or (_kernel(down), _kernel(up)) != wanted:
        raise ModelError(
            f"LoRA {path} has factors {tuple(down.shape)} and {tuple(up.shape)} for the layer {name}, "
            f"whose weight is {tuple(weight.shape)}; {_ANOTHER_FAMILY}"
        )
    if "alpha" not in parts:
        return Adapter(down, up, _trained_scale(path, name, rank, trained))
    if parts["alpha"].numel() != 1:
        raise ModelError(f"LoRA {path} has an alpha that is not a single number for the layer {name}")
    return Adapter(down, up, float(parts["alpha"]) / rank)


def _kernel(tensor: Tensor) -> tuple[int, ...]:
    """The shape as a convolution has it: (out, in, kh, kw)."""
    shape = tuple(tensor.shape)
    return (*shape, 1, 1) if len(shape) == 2 else shape


def _some(keys: list[str]) -> str:
    noun = "1 key" if len(keys) == 1 else f"{len(keys)} keys"
    return f"{noun} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"


# -- names -----------------------------------------------------------------------------------------------


def _spellings(layers: Iterable[str], aliases: Mapping[str, str]) -> dict[str, str]:
    """What files call a layer → its name in ``layers``."""
    spellings = {}
    for name in layers:
        network, _, path = name.partition(".")
        # Before peft all attention spoke the U-Net's language, and its output had no number.
        old = re.sub(r"\.(q|k|v|out)_proj$", r".to_\1", path).removesuffix(".0")
        # Some releases of transformers leave "text_model." out.
        for spelt in {path, old, path.removeprefix("text_model.")}:
            spellings[f"{network}.{spelt}"] = name
            if network == "unet":
                spellings[spelt] = name  # files of attention processors alone have no prefix
        spellings |= {f"{prefix}_{path.replace('.', '_')}": name for prefix in _KOHYA.get(network, ())}
    for original, path in aliases.items():
        if (name := f"unet.{path}") in spellings:
            spellings[f"lora_unet_{original.replace('.', '_')}"] = spellings[name]
    return spellings


# -- the scale of files without alpha keys ---------------------------------------------------------------


def _trained(path: Path, metadata: Mapping[str, str]) -> Mapping[str, Any]:
    """The settings of peft that diffusers stores in the header: "unet.lora_alpha", "unet.alpha_pattern" and so on."""
    try:
        trained = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError as error:
        raise ModelError(f"LoRA {path} has lora_adapter_metadata that is not JSON: {error}") from None
    return trained if isinstance(trained, dict) else {}


def _trained_scale(path: Path, name: str, rank: int, trained: Mapping[str, Any]) -> float:
    """α/r, or α/√r of a rank-stabilised adapter (Kalajdzievski 2023); 1 where the file says nothing."""
    network, _, layer = name.partition(".")
    alpha = trained.get(f"{network}.lora_alpha", rank)
    try:
        for pattern, value in (trained.get(f"{network}.alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", layer):
                alpha = value
                break
        return float(alpha) / (math.sqrt(rank) if trained.get(f"{network}.use_rslora") else rank)
    except (re.error, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"LoRA {path} has an alpha that can't be read for the layer {name}: {error}") from None
