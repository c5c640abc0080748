"""What the engine asks of a model: facts to plan with, and pictures. Whatever answers can make a job's pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from sdbatch.prompts import ImageRequest, ModelFacts

if TYPE_CHECKING:
    from sdbatch.diffusion.tokenizer import CLIPTokenizer


@dataclass(frozen=True)
class FoundModel:
    """A model that was found but not loaded: all that planning needs, small enough to send to other processes."""

    sha256: str  # over everything that decides what it computes
    facts: ModelFacts
    most_clip_skip: int  # layers that its text encoders can leave out
    path: Path | None = None  # on this machine
    tokenizers: tuple[CLIPTokenizer, ...] = ()

    def chunks(self, texts: Sequence[str], *, emphasis: bool) -> list[int]:
        """In how many chunks each text can be read whole."""
        if not self.tokenizers:
            return [1] * len(texts)
        from sdbatch.diffusion.prompt import chunks_needed  # torch takes seconds to import

        by_encoder = [chunks_needed(tokenizer, texts, emphasis=emphasis) for tokenizer in self.tokenizers]
        return [max(of_text) for of_text in zip(*by_encoder, strict=True)]


class Drawn(Protocol):
    """A batch of pictures. Unless they are ``there`` the device may still fail; ``wait`` raises that, in any thread."""

    @property
    def there(self) -> bool: ...
    def wait(self) -> tuple[np.ndarray, list[bool]]: ...


@dataclass(frozen=True)
class DrawnAtOnce:
    """Pictures that are there."""

    pixels: np.ndarray
    finite: list[bool]
    there: bool = True

    def wait(self) -> tuple[np.ndarray, list[bool]]:
        return self.pixels, self.finite


class ImageModel(Protocol):
    """A loaded model, with a job's settings that all its pictures share."""

    sha256: str
    environment: dict[str, str]  # what else may change a picture's bytes: device, library versions
    mask_cell: int  # pixels; masks are repainted in squares of this side
    device_errors: tuple[type[Exception], ...]  # that are the device's fault, no request's
    memory_errors: tuple[type[Exception], ...]  # those of them that a smaller batch would not meet

    def draw(
        self, requests: Sequence[ImageRequest | None], pictures: np.ndarray | None, masks: np.ndarray | None
    ) -> Drawn:
        """Pixels (B, H, W, 3) uint8 of a full batch of requests of one shape, and which of them came out finite.

        They may still be on their way, but those of the batch before are not.

        None is an empty slot; the first slot need not be filled, but one of them is. ``pictures`` (B, H, W, 3) uint8
        are what they start from, ``masks`` (B, H, W) bool where they are made anew; None where the batch has none.
        """
        ...

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        """Which prompts are longer than the model reads."""
        ...
