"""The generator: what runs in each actor. It hosts the whole model and turns shards into committed pictures.

The model works in one thread and on one shard at a time; encoding and upload of a shard's pictures go on
beside it, while the model is already at the next shard.
"""

from __future__ import annotations

import os
import platform
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL
import torch

from sdbatch import __version__
from sdbatch.diffusion import LatentDiffusion, Reading, to_uint8
from sdbatch.engine.models import load_model
from sdbatch.engine.pictures import BadPicture, read_mask, read_picture
from sdbatch.engine.shards import ShardCommitter, metadata_row
from sdbatch.errors import JobFailed, ModelError
from sdbatch.ledger import Job, Shard, read_slice
from sdbatch.outputs import EncodedPicture, encode
from sdbatch.prompts import ImageRequest, from_table
from sdbatch.spec import JobSpec, parse_spec
from sdbatch.storage import open_store

#: Batches that are encoded and stored beside the model's work.
_FINISHERS = 2


@dataclass(frozen=True)
class Receipt:
    """What an actor hands back for a shard: numbers, no pixels."""

    shard: int
    committed: int
    quarantined: int
    failed_making: int  # of the quarantined, those that failed here and now
    batches: int  # that the model computed


@dataclass(frozen=True)
class Refused:
    """A request that could not be made, and why."""

    error: str


@dataclass(frozen=True)
class _Ended:
    """A request that is through: its metadata row, and its picture unless it was refused."""

    row: dict[str, Any]
    picture: EncodedPicture | None


@dataclass(frozen=True)
class _Slot:
    """A request in its place in a batch, and the pictures that it starts from."""

    request: ImageRequest
    picture: np.ndarray | None  # (H, W, 3) uint8
    mask: np.ndarray | None  # (H, W) bool


#: What the model makes of a request: pixels (H, W, 3) and whether its prompt was cut, or why it can't be made.
_Result = tuple[np.ndarray, bool] | Refused


class Generator:
    """One model on one device, fed with shards. ``load`` comes first."""

    model: LatentDiffusion

    def __init__(self, spec: dict[str, Any], job: Job) -> None:
        self.spec: JobSpec = parse_spec(spec)
        self.job = job
        reading = self.spec.generate
        self._reading = Reading(reading.long_prompts, reading.emphasis, reading.clip_skip)
        self._pictures_at = self.spec.input.uri
        self.store = open_store(self.spec.output.uri)
        self._slice: tuple[int, Any] = (-1, None)
        self._made = 0
        self._model_turn = threading.Lock()
        threads = self.spec.resources.cpus_per_actor
        # Thread counts belong to the thread that sets them, and they can change a picture's last bits.
        self._model_thread = ThreadPoolExecutor(1, "model", initializer=torch.set_num_threads, initargs=(threads,))
        self._finishers = ThreadPoolExecutor(_FINISHERS, "finisher")

    def load(self) -> dict[str, str]:
        """Load the model; returns the environment that pictures depend on."""
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        device = self.spec.resources.device
        self.model, sha256 = self._model_thread.submit(load_model, self.spec.model, device).result()
        if sha256 != self.job.model_sha256:
            raise ModelError(
                f"model '{self.spec.model.uri}' is another one on {platform.node()} than the job was planned with"
            )
        self.environment = _environment(device, self.spec.resources.cpus_per_actor)
        self._committer = ShardCommitter(self.store, self.spec, self.job, self.environment)
        return self.environment

    def images_made(self) -> int:
        """Images that left the model so far; asked now and then for the progress bar."""
        return self._made

    def run_shard(self, shard: Shard) -> Receipt:
        """Make, store and commit a shard. What other writers have finished of it is taken as it is."""
        started = time.perf_counter()
        record = self._committer.finish_started(shard)
        if record is not None:
            self._made += shard.count
            return Receipt(shard.number, record.committed, record.quarantined, 0, 0)
        requests = self._requests(shard)
        kept = self._committer.writer.kept(shard.stem)
        size = self.spec.resources.batch_size
        finishing: list[Future[list[_Ended]]] = []
        batches, model_seconds = 0, 0.0
        with self._model_turn:
            for first in range(0, len(requests), size):
                batch = requests[first : first + size]
                if all(first + slot in kept for slot in range(len(batch))):
                    ended: Future[list[_Ended]] = Future()
                    ended.set_result(self._recovered(shard, first, batch, kept))
                    finishing.append(ended)
                else:
                    began = time.perf_counter()
                    results = self._model_thread.submit(self._make, batch).result()
                    model_seconds += time.perf_counter() - began
                    batches += 1
                    last = first + size >= len(requests)
                    finishing.append(self._finishers.submit(self._finish, shard, first, batch, results, last))
                self._made += len(batch)
        everything = [end for done in finishing for end in done.result()]
        rows = [end.row for end in everything]
        pictures = [end.picture for end in everything if end.picture is not None]
        seconds = {"model": model_seconds, "shard": time.perf_counter() - started}
        record = self._committer.commit(shard, rows, pictures, seconds, writer=uuid.uuid4().hex)
        return Receipt(shard.number, record.committed, record.quarantined, len(rows) - len(pictures), batches)

    # -- one batch ---------------------------------------------------------------------------------------

    def _requests(self, shard: Shard) -> list[ImageRequest]:
        number, table = self._slice
        if number != shard.slice:
            table = read_slice(self.store, self.job, shard.slice)
            self._slice = (shard.slice, table)
        return from_table(table.slice(shard.offset, shard.count))

    def _make(self, batch: Sequence[ImageRequest]) -> list[_Result]:
        """Pictures of a batch in its slots. If the batch fails as a whole, each request is tried by itself."""
        given = [self._given(request) for request in batch]
        empty = self.spec.resources.batch_size - len(batch)
        slots = [
            None if isinstance(pictures, Refused) else _Slot(request, *pictures)
            for request, pictures in zip(batch, given, strict=True)
        ] + [None] * empty
        results: list[_Result] = self._compute_kindly(slots) if any(slots) else [Refused("")] * len(slots)
        return [
            pictures if isinstance(pictures, Refused) else result
            for pictures, result in zip(given, results, strict=False)
        ]

    def _given(self, request: ImageRequest) -> tuple[np.ndarray | None, np.ndarray | None] | Refused:
        """The picture that a request starts from and its mask, as far as it has any."""
        size = request.width, request.height
        try:
            picture = read_picture(request.init_image, self._pictures_at, size) if request.init_image else None
            cell = self.model.vae.config.downscale
            mask = read_mask(request.mask_image, self._pictures_at, size, cell) if request.mask_image else None
        except BadPicture as error:
            return Refused(str(error))
        return picture, mask

    def _compute_kindly(self, slots: Sequence[_Slot | None]) -> list[_Result]:
        try:
            return self._compute(slots)
        except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
            raise self._device_failed(error, slots) from None
        except Exception:
            return [Refused("") if slot is None else self._compute_alone(slots, i) for i, slot in enumerate(slots)]

    def _device_failed(self, error: Exception, slots: Sequence[_Slot | None]) -> JobFailed:
        """The device's fault, not a request's. After any but a lack of memory only a new process gets it back."""
        if not isinstance(error, torch.OutOfMemoryError):
            os._exit(1)
        lead = next(slot.request for slot in slots if slot is not None)
        return JobFailed(
            f"a batch of {len(slots)} at {lead.width}x{lead.height} does not fit the device's memory; "
            "lower resources.batch_size"
        )

    def _compute_alone(self, slots: Sequence[_Slot | None], place: int) -> _Result:
        """One request in its own slot of a padded batch: the same bytes as in company."""
        alone = [slot if i == place else None for i, slot in enumerate(slots)]
        try:
            return self._compute(alone)[place]
        except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
            raise self._device_failed(error, alone) from None
        except Exception as error:
            return Refused(f"{type(error).__name__}: {error}")

    def _compute(self, slots: Sequence[_Slot | None]) -> list[_Result]:
        """Run the model on a full batch; empty slots are padded. A picture that is not finite is refused."""
        filled = [slot.request if slot is not None else None for slot in slots]
        first = next(slot for slot in slots if slot is not None)
        lead, settings = first.request, self.spec.generate
        prompts = ["" if request is None else request.prompt for request in filled]
        latents = self.model.generate(
            prompts,
            ["" if request is None else request.negative_prompt for request in filled],
            seeds=[0 if request is None else request.seed for request in filled],
            width=lead.width,
            height=lead.height,
            num_inference_steps=lead.num_inference_steps,
            guidance_scale=[lead.guidance_scale if request is None else request.guidance_scale for request in filled],
            sampler=lead.sampler,
            eta=settings.eta,
            guidance_rescale=settings.guidance_rescale,
            guidance_interval=settings.guidance_interval,
            reading=self._reading,
            chunks=lead.chunks,
            init_images=_stack([slot.picture if slot else None for slot in slots], first.picture),
            mask_images=_stack([slot.mask if slot else None for slot in slots], first.mask),
            strength=1.0 if lead.strength is None else lead.strength,
            output="latent",
        )
        pictures = self.model.decode(latents)
        finite = pictures.isfinite().flatten(1).all(dim=1).tolist()
        pixels = to_uint8(pictures.nan_to_num())
        for place, slot in enumerate(slots):
            if slot is not None and slot.mask is not None:  # what is not painted anew stays as it was, to the bit
                pixels[place] = np.where(slot.mask[:, :, None], pixels[place], slot.picture)
        truncated = self._truncated(prompts)
        return [
            (pixels[slot], truncated[slot]) if finite[slot] else Refused("the picture is not finite (NaN or infinity)")
            for slot in range(len(slots))
        ]

    # -- after the model ---------------------------------------------------------------------------------

    def _finish(
        self, shard: Shard, first: int, batch: Sequence[ImageRequest], results: Sequence[_Result], last: bool
    ) -> list[_Ended]:
        """Encode a batch that starts at position ``first`` of its shard and make it outlive this process."""
        rows, pictures = [], []
        for position, (request, result) in enumerate(zip(batch, results, strict=True), first):
            if isinstance(result, Refused):
                rows.append(metadata_row(self.job, shard.number, request, error=result.error))
                continue
            pixels, truncated = result
            row = metadata_row(self.job, shard.number, request, truncated=truncated)
            try:
                pictures.append(EncodedPicture(position, row, encode(pixels, self.spec.output.image, row)))
            except (OSError, ValueError) as error:  # too large for its format, say
                told = f"the picture can't be encoded as {self.spec.output.image.type}: {error}"
                row = metadata_row(self.job, shard.number, request, error=told)
            rows.append(row)
        kept = self._committer.writer.keep(shard.stem, pictures, last=last)
        by_position = {picture.position: picture for picture in kept}
        return [_Ended(row, by_position.get(position)) for position, row in enumerate(rows, first)]

    def _recovered(
        self, shard: Shard, first: int, batch: Sequence[ImageRequest], kept: Mapping[int, bytes]
    ) -> list[_Ended]:
        """A batch that an earlier writer finished."""
        ended = []
        truncated = self._truncated([request.prompt for request in batch])
        for position, (request, cut) in enumerate(zip(batch, truncated, strict=True), first):
            row = metadata_row(self.job, shard.number, request, truncated=cut)
            ended.append(_Ended(row, EncodedPicture(position, row, kept[position])))
        return ended

    def _truncated(self, prompts: Sequence[str]) -> list[bool]:
        """Which prompts are longer than the model reads."""
        if self._reading.long_prompts == "chunk":
            return [False] * len(prompts)
        return [length > self.model.tokenizer.room for length in self.model.lengths(prompts, self._reading)]


def _stack(arrays: Sequence[np.ndarray | None], like: np.ndarray | None) -> np.ndarray | None:
    """One array for the whole batch, blank in empty slots; None for a batch without such pictures."""
    return None if like is None else np.stack([np.zeros_like(like) if array is None else array for array in arrays])


def _environment(device: str, threads: int) -> dict[str, str]:
    named = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {
        "sdbatch": __version__,
        "torch": str(torch.__version__),
        "pillow": PIL.__version__,
        "device": named,
        "threads": str(threads),
    }
