"""The model that is measured: each technique can be left out, to see what it brings."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdbatch.diffusion.conditioning import Conditioning
from sdbatch.diffusion.pipeline import LatentDiffusion


class Subject(LatentDiffusion):
    """A model that begins as a plain script has it: every text is read, and told to the U-Net, anew."""

    texts_once = False  # a distinct prompt is read once, the negative one once for good
    keys_values_once = False  # a text's keys and values are made once, not at every step
    attention: SDPBackend | None = None  # PyTorch's own choice

    def encode(self, prompts: Sequence[str], **how: Any) -> Conditioning:
        return super().encode(prompts, **how) if self.texts_once else self.condition(prompts, **how)

    def with_keys_values(self, conditioning: Conditioning) -> Conditioning:
        return super().with_keys_values(conditioning) if self.keys_values_once else conditioning

    def denoise(self, z: Tensor, t: float, conditioning: Conditioning) -> Tensor:
        # Around the U-Net alone: heads of the VAE are wider than most kernels can.
        with nullcontext() if self.attention is None else sdpa_kernel(self.attention):
            return super().denoise(z, t, conditioning)

    def modules_of(self, *kinds: type[nn.Module]) -> list[Any]:
        """The U-Net's parts of some kinds."""
        return [module for module in self.unet.modules() if isinstance(module, kinds)]
