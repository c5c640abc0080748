"""``builtin:null``: a model without a network, to measure everything but the model."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence

import numpy as np

from sdbatch.engine.models.image_model import Drawn, DrawnAtOnce, FoundModel
from sdbatch.prompts import ImageRequest, ModelFacts

NULL = "builtin:null"

#: Names what is drawn: a change to the pictures is a change to this.
_VERSION = b"builtin:null, coloured blocks, 1"
_SHA256 = hashlib.sha256(_VERSION).hexdigest()
_BLOCKS = 4  # a side: every multiple of 8 pixels is one of 4


class NullModel:
    """Coloured blocks that depend on the seed and the size alone; whatever else is asked for is ignored."""

    sha256 = _SHA256
    mask_cell = 8
    device_errors: tuple[type[Exception], ...] = ()
    memory_errors: tuple[type[Exception], ...] = ()

    def __init__(self) -> None:
        self.environment = {"device": platform.machine()}

    def draw(
        self, requests: Sequence[ImageRequest | None], pictures: np.ndarray | None, masks: np.ndarray | None
    ) -> Drawn:
        """See ``ImageModel``."""
        lead = next(request for request in requests if request is not None)
        colours = np.stack([_colours(0 if request is None else request.seed) for request in requests])
        pixels = colours.repeat(lead.height // _BLOCKS, axis=1).repeat(lead.width // _BLOCKS, axis=2)
        return DrawnAtOnce(pixels, [True] * len(requests))

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        """None is: no prompt is read."""
        return [False] * len(prompts)


def find_null() -> FoundModel:
    """What planning must know of it."""
    return FoundModel(_SHA256, ModelFacts((16, 16)), most_clip_skip=12)


def _colours(seed: int) -> np.ndarray:
    """(4, 4, 3) uint8."""
    digest = hashlib.blake2b(seed.to_bytes(8, "big"), digest_size=_BLOCKS * _BLOCKS * 3).digest()
    return np.frombuffer(digest, np.uint8).reshape(_BLOCKS, _BLOCKS, 3)
