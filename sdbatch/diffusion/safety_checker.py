"""Stable Diffusion's safety checker: CLIP's image encoder, and concepts that pictures should not show.

The module tree carries the key names of diffusers' ``StableDiffusionSafetyChecker``; ``clip_folder`` reads its folder.
A concept is a vector and a threshold: a picture shows it where the cosine of the two is larger. Pictures that come near
one of the concepts of special care are judged more strictly.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdbatch.diffusion.checkpoint import Component
from sdbatch.diffusion.clip_folder import ClipFolder
from sdbatch.diffusion.image_encoder import ImageEncoder, preprocess
from sdbatch.errors import ModelError

#: How much lower thresholds are for pictures that need special care.
_STRICTER = 0.01
#: Weights that only safety checkers have.
CONCEPTS, _SPECIAL = "concept_embeds", "special_care_embeds"


class SafetyChecker(nn.Module):
    """Pictures (B, H, W, 3) uint8 → how far they are beyond the threshold of each concept, (B, concepts)."""

    def __init__(self, found: ClipFolder, concepts: int, special: int) -> None:
        super().__init__()
        width = found.projection_dim
        self.preprocessing = found.preprocessing
        self.names = [f"concept {number}" for number in range(concepts)]  # they were published without their words
        self.vision_model = ImageEncoder(found.image)
        self.visual_projection = nn.Linear(found.image.hidden_size, width, bias=False)
        self.concept_embeds = nn.Parameter(torch.empty(concepts, width))
        self.special_care_embeds = nn.Parameter(torch.empty(special, width))
        self.concept_embeds_weights = nn.Parameter(torch.empty(concepts))  # thresholds of cosines
        self.special_care_embeds_weights = nn.Parameter(torch.empty(special))

    @classmethod
    def of(cls, found: ClipFolder) -> SafetyChecker:
        """The network that a folder describes, its weights still to be read."""
        counts = []
        for name in (CONCEPTS, _SPECIAL):
            shape = found.weights.shapes.get(name, ())
            if len(shape) != 2 or not shape[0]:
                raise ModelError(
                    f"model file {found.weights.name}: {name} is {shape} but should be vectors of concepts"
                )
            counts.append(shape[0])
        return cls(found, *counts)

    @torch.inference_mode()
    def beyond(self, images: np.ndarray) -> Tensor:
        """(B, concepts) float32, in thousandths: above 0 the picture shows the concept."""
        weight = self.visual_projection.weight
        pixels = torch.from_numpy(preprocess(images, self.preprocessing)).to(weight.device, weight.dtype)
        vectors = F.normalize(self.visual_projection(self.vision_model(pixels)[1]).float(), dim=-1)
        stricter = torch.zeros(len(vectors), 1, device=vectors.device)
        # One after the other: near the first of them, the others' thresholds are lower already.
        for care, threshold in zip(self.special_care_embeds, self.special_care_embeds_weights, strict=True):
            near = _thousandths(vectors @ F.normalize(care.float(), dim=-1) - threshold.float() + stricter[:, 0]) > 0
            stricter[near] = _STRICTER
        cosines = vectors @ F.normalize(self.concept_embeds.float(), dim=-1).T
        return _thousandths(cosines - self.concept_embeds_weights.float() + stricter)


def safety_component(found: ClipFolder) -> Component:
    """A safety checker as it lies in a folder: ``skeleton`` tells whether all weights fit, ``load`` reads them."""
    return Component("safety_checker", SafetyChecker.of, found, found.weights, found.origins())


def _thousandths(values: Tensor) -> Tensor:
    return values.round(decimals=3)
