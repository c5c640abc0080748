"""How much memory a checkpoint takes, told before it is loaded: the networks run on tensors without content.

What is counted are tensors: weights, activations, conditioning, latents, pictures. What is not: the allocator's
fragmentation and rounding, workspaces of cuDNN and cuBLAS, the CUDA context (about half a gigabyte), and, less than a
thousandth, what several steps of a sampler keep of latents, and a batch's distinct texts beyond the second of states.
Attention counts as its output alone: fused kernels never hold the matrix of all pairs. On a GPU group norms and
convolutions copy what they get into another layout (channels first, channels last) for as long as they take; that is
counted with ``on_gpu``, and without it what the U-Net's convolutions keep laid out for a processor.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdbatch.diffusion.checkpoint import Checkpoint, Component
from sdbatch.diffusion.conditioning import Conditioning
from sdbatch.diffusion.convolution import packed_bytes
from sdbatch.diffusion.pipeline import LatentDiffusion, vae_dtype
from sdbatch.diffusion.weights import DTYPES, skeletons

#: Texts that are read one by one to know what they take, half a second each in a large model.
_DISTINCT = 2


@dataclass(frozen=True)
class Memory:
    """Bytes on the device. The peaks include the weights that lie there at the time."""

    weights: Mapping[str, int]  # of each network
    encoding: int
    denoising: int
    decoding: int
    resident: int  # weights that lie there all the time

    @property
    def peak(self) -> int:
        return max(self.encoding, self.denoising, self.decoding)

    @property
    def beside(self) -> int:
        """The peak where a batch is decoded beside the next one's denoising, as jobs on a GPU do."""
        return max(self.encoding, self.denoising + self.decoding - self.resident)


def peak_bytes(
    checkpoint: Checkpoint,
    *,
    dtype: str,
    batch: int,
    width: int,
    height: int,
    vae_tiling: bool = False,
    vae_slicing: bool = False,
    offload_text_encoders: bool = False,
    guided: bool = True,
    on_gpu: bool = False,
) -> Memory:
    """What ``LatentDiffusion.generate`` takes for ``batch`` pictures from prompts of one chunk.

    Nothing is loaded or computed; the checkpoint's files need not even hold weights. ``dtype`` as in
    ``from_pretrained``.
    """
    kind = DTYPES[dtype]
    with skeletons():
        unet: Any = checkpoint.unet.kind(checkpoint.unet.config).to(kind)
        vae: Any = checkpoint.vae.kind(checkpoint.vae.config).to(vae_dtype(checkpoint.vae.config, kind))
        encoders: list[Any] = [part.kind(part.config).to(kind) for part in checkpoint.text_encoders]
    model = LatentDiffusion(checkpoint, encoders, unet, vae)
    model.vae_tiling, model.vae_slicing = vae_tiling, vae_slicing
    weights = {"unet": _weights(unet), "vae": _weights(vae)}
    weights |= {part.name: _weights(encoder) for part, encoder in zip(checkpoint.text_encoders, encoders, strict=True)}
    of_encoders = [weights[part.name] for part in checkpoint.text_encoders]
    resident = weights["unet"] + weights["vae"] + (0 if offload_text_encoders else sum(of_encoders))
    resident += 0 if on_gpu else packed_bytes(unet)
    size = {"batch": batch, "width": width, "height": height}
    encoding, denoising, decoding = activations(model, **size, guided=guided, on_gpu=on_gpu)
    return Memory(
        weights,
        encoding=resident + encoding + (max(of_encoders) if offload_text_encoders else 0),
        denoising=resident + denoising,
        decoding=resident + decoding,
        resident=resident,
    )


def activations(
    model: LatentDiffusion, *, batch: int, width: int, height: int, guided: bool, on_gpu: bool = False
) -> tuple[int, int, int]:
    """The most bytes alive, beside the weights, while a model encodes, denoises (one step) and decodes."""
    factor, channels = model.vae.config.downscale, model.vae.config.latent_channels
    with live_tensors(model.device, on_gpu=on_gpu) as live:
        # All distinct is the most that a batch takes; beyond two, another text's states are nothing beside a picture.
        prompts = [str(number % _DISTINCT) for number in range(batch)]
        conditioning = given = model.encode(prompts, size=(width, height))
        if guided:
            conditioning = model.encode(prompts, size=(width, height), negative=True) + given
        encoding = live.restart()
        conditioning = model.with_keys_values(conditioning)
        latents = torch.zeros(batch, channels, height // factor, width // factor, device=model.device)
        _step(model, latents, conditioning, guided)
        denoising = live.restart()
        model.decode(latents)
        decoding = live.restart()
    return encoding, denoising, decoding


def image_encoder_bytes(component: Component, batch: int) -> int:
    """What a CLIP or a safety checker takes on the device while it looks at ``batch`` pictures, in float32."""
    with skeletons():
        module: Any = component.kind(component.config)
    side = module.vision_model.config.image_size
    with torch.inference_mode(), live_tensors("meta") as live:
        module.vision_model(torch.zeros(batch, 3, side, side, device="meta"))
    return _weights(module) + live.peak


def _step(model: LatentDiffusion, latents: torch.Tensor, conditioning: Conditioning, guided: bool) -> None:
    """What the network does in each step of a sampler, in an inpainting model with the mask and picture beside z."""
    missing = model.unet.config.in_channels - latents.shape[1]
    z = F.pad(latents, (0, 0, 0, 0, 0, missing)) if missing else latents
    model.denoise(torch.cat([z, z]) if guided else z, 999.0, conditioning)


def _weights(module: nn.Module) -> int:
    return sum(value.nbytes for value in module.state_dict().values())


class LiveTensors:
    """The memory of tensors that are alive, in bytes, now and at most; tensors that share memory count once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.now = self.peak = 0
        self._storages: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def follow(self, result: Any, arguments: Any) -> None:
        """Count what a function made: neither views of its arguments nor anything that was counted before."""
        known = self._storages_of(arguments)
        for storage in self._storages_of(result):
            if storage in self._storages or any(storage is other for other in known):
                continue
            self._storages.add(storage)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, storage.nbytes()).atexit = False

    def copied(self, tensor: torch.Tensor) -> None:
        """Count a copy of a tensor that is gone again."""
        if tensor.device == self.device:
            self.peak = max(self.peak, self.now + tensor.nbytes)

    def restart(self) -> int:
        """The peak so far; a new one begins from what is alive."""
        peak, self.peak = self.peak, self.now
        return peak

    def _forget(self, size: int) -> None:
        self.now -= size

    def _storages_of(self, values: Any) -> list[torch.UntypedStorage]:
        return [
            tensor.untyped_storage()
            for tensor in tree_leaves(values)
            if isinstance(tensor, torch.Tensor) and tensor.device == self.device
        ]


@contextmanager
def live_tensors(device: torch.device | str, *, on_gpu: bool = False) -> Iterator[LiveTensors]:
    """Follow all tensors that are made on ``device`` in here, until they are gone; with what a GPU copies, or not."""
    live = LiveTensors(torch.device(device))
    every = _EveryFunction(live, _COPYING if on_gpu else ())
    with every, _FusedAttention(live, every):
        yield live


#: Functions whose GPU kernels want their input in another layout than those before them leave it.
_COPYING = (torch.ops.aten.conv2d.default, torch.ops.aten.group_norm.default)


class _EveryFunction(TorchDispatchMode):
    """Shows ``live`` what each of PyTorch's basic functions makes; those of ``copying`` copy their input, too."""

    def __init__(self, live: LiveTensors, copying: tuple[Any, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live, self.copying = live, copying
        self.looking = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.looking:
            self.live.follow(result, (args, kwargs))
            if func in self.copying:
                self.live.copied(args[0])
        return result


class _FusedAttention(TorchFunctionMode):
    """Keeps what an attention that is not fused makes on its way out of ``live``."""

    def __init__(self, live: LiveTensors, every: _EveryFunction) -> None:
        super().__init__()
        self.live, self.every = live, every

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.every.looking = False
        try:
            result = func(*args, **kwargs)
        finally:
            self.every.looking = True
        self.live.follow(result, (args, kwargs))
        return result
