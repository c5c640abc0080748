"""One batch: requests in their slots, what they start from, and what the model makes of them or why it can't."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import numpy as np

from sdbatch.engine.making.pictures import BadPicture, Fetched, fetch, read_mask, read_picture
from sdbatch.engine.models.image_model import Drawn, ImageModel
from sdbatch.engine.models.loading import footprint
from sdbatch.engine.planning.batching import device_bytes, too_large
from sdbatch.errors import JobFailed
from sdbatch.prompts import ImageRequest
from sdbatch.spec import JobSpec


@dataclass(frozen=True)
class Made:
    """A picture as it left the model. ``columns``: what its metadata tell otherwise, or more, than the request."""

    pixels: np.ndarray  # (H, W, 3) uint8
    truncated: bool  # its prompt was cut
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Refused:
    """A request that could not be made, or whose picture is not kept, and why."""

    error: str
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NotFinite(Refused):
    """A request whose picture, or the latent that it is decoded from, is not finite."""

    error: str = "the picture is not finite (NaN or infinity)"


Result = Made | Refused

#: Seconds in which a thread notes which batch the device failed at.
_GRACE = 2.0


@dataclass(frozen=True)
class Coming:
    """A picture that is on its way from the device. ``result`` waits for it, and raises what happened to the device."""

    result: Callable[[], Result]


def end_process() -> NoReturn:
    """End this process, whose device failed. What failed may be the batch before, which the thread that waits for it
    tells the logbook: it goes first."""
    time.sleep(_GRACE)
    os._exit(1)


def arrived(results: Mapping[int, Result | Coming]) -> dict[int, Result]:
    """All results, when they are there."""
    return {at: result.result() if isinstance(result, Coming) else result for at, result in results.items()}


@dataclass(frozen=True)
class Slot:
    """A request in its place in a batch, and the pictures that it starts from."""

    request: ImageRequest
    picture: np.ndarray | None  # (H, W, 3) uint8
    mask: np.ndarray | None  # (H, W) bool


class BatchMaker:
    """Makes batches of the planned size with one model. ``pictures_at``: where relative paths of pictures begin."""

    def __init__(self, model: ImageModel, spec: JobSpec, pictures_at: str) -> None:
        self._model, self._spec, self._pictures_at = model, spec, pictures_at

    def make(self, first: int, batch: Mapping[int, ImageRequest]) -> dict[int, Result | Coming]:
        """Pictures of a batch, position → request, whose first slot is position ``first``.

        If the batch fails as a whole, each request is tried by itself.
        """
        named = (where for request in batch.values() for where in (request.init_image, request.mask_image) if where)
        fetched = fetch(named, self._pictures_at)
        given = {position: self._given(request, fetched) for position, request in batch.items()}
        slots: list[Slot | None] = [None] * self._spec.resources.at_once
        for position, pictures in given.items():
            if not isinstance(pictures, Refused):
                slots[position - first] = Slot(batch[position], *pictures)
        results = self._compute_kindly(slots) if any(slots) else []
        return {
            position: pictures if isinstance(pictures, Refused) else results[position - first]
            for position, pictures in given.items()
        }

    def compute(self, slots: Sequence[Slot | None]) -> Sequence[Result | Coming]:
        """Run the model on a full batch; empty slots are padded. A picture that is not finite is refused."""
        filled = [slot.request if slot is not None else None for slot in slots]
        first = next(slot for slot in slots if slot is not None)
        drawn = self._model.draw(
            filled,
            _stack([slot.picture if slot else None for slot in slots], first.picture),
            _stack([slot.mask if slot else None for slot in slots], first.mask),
        )
        truncated = self._model.truncated(["" if request is None else request.prompt for request in filled])
        coming = [Coming(partial(_result, drawn, slots, place, truncated[place])) for place in range(len(slots))]
        return [one.result() for one in coming] if drawn.there else list[Result | Coming](coming)

    def _given(self, request: ImageRequest, fetched: Fetched) -> tuple[np.ndarray | None, np.ndarray | None] | Refused:
        """The picture that a request starts from and its mask, as far as it has any."""
        start, mask, base = request.init_image, request.mask_image, self._pictures_at
        size = request.width, request.height
        try:
            return (
                read_picture(start, base, size, fetched) if start else None,
                read_mask(mask, base, size, self._model.mask_cell, fetched) if mask else None,
            )
        except BadPicture as error:
            return Refused(str(error))

    def _compute_kindly(self, slots: Sequence[Slot | None]) -> Sequence[Result | Coming]:
        try:
            return self.compute(slots)
        except self._model.device_errors as error:
            raise self._device_failed(error, slots) from None
        except JobFailed:
            raise
        except Exception:
            return [Refused("") if slot is None else self._compute_alone(slots, i) for i, slot in enumerate(slots)]

    def _device_failed(self, error: Exception, slots: Sequence[Slot | None]) -> JobFailed:
        """The device's fault, not a request's. After any but a lack of memory only a new process gets it back."""
        if not isinstance(error, self._model.memory_errors):
            end_process()
        lead = next(slot.request for slot in slots if slot is not None)
        takes, limit = footprint(self._spec, lead.width, lead.height), device_bytes(self._spec.resources)
        return JobFailed(too_large(len(slots), lead.width, lead.height, takes, limit or 0))

    def _compute_alone(self, slots: Sequence[Slot | None], place: int) -> Result | Coming:
        """One request in its own slot of a padded batch: the same bytes as in company."""
        alone = [slot if i == place else None for i, slot in enumerate(slots)]
        try:
            return self.compute(alone)[place]
        except self._model.device_errors as error:
            raise self._device_failed(error, alone) from None
        except JobFailed:
            raise
        except Exception as error:
            return Refused(f"{type(error).__name__}: {error}")


def _result(drawn: Drawn, slots: Sequence[Slot | None], place: int, truncated: bool) -> Result:
    """What became of the picture in a slot, once it is there."""
    pixels, finite = drawn.wait()
    if not finite[place]:
        return NotFinite()
    made, slot = pixels[place], slots[place]
    if slot is not None and slot.mask is not None:  # what is not painted anew stays as it was, to the bit
        made = np.where(slot.mask[:, :, None], made, slot.picture)
    return Made(made, truncated)


def _stack(arrays: Sequence[np.ndarray | None], like: np.ndarray | None) -> np.ndarray | None:
    """One array for the whole batch, blank in empty slots; None for a batch without such pictures."""
    return None if like is None else np.stack([np.zeros_like(like) if array is None else array for array in arrays])
