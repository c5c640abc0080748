"""The generator: what runs in each actor. It hosts the whole model and turns shards into committed pictures.

The model works in one thread and on one shard at a time; encoding and upload of a shard's pictures go on
beside it, while the model is already at the next shard.
"""

from __future__ import annotations

import hashlib
import os
import platform
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import PIL
import ray

from sdbatch import __version__
from sdbatch.checks import Looks
from sdbatch.engine.costs.speeds import Measured, shape_of
from sdbatch.engine.making.batch import BatchMaker, Coming, Refused, Result, arrived, end_process
from sdbatch.engine.making.choosing import Choice, Chooser, Draw
from sdbatch.engine.making.finishers import Finishers
from sdbatch.engine.making.logbook import Mark, Pen
from sdbatch.engine.making.metrics import ActorMetrics
from sdbatch.engine.making.shards import Ended, ShardCommitter, metadata_row
from sdbatch.engine.models.image_model import ImageModel
from sdbatch.engine.models.loading import load_job_measures, load_model
from sdbatch.errors import JobFailed, ModelError
from sdbatch.ledger import DROPPED, Job, Shard, read_slice
from sdbatch.ledger.attempts import UNTRIED, Attempts
from sdbatch.outputs import EncodedPicture, Signer, check_columns, checked_columns, encode, pixels_sum
from sdbatch.prompts import ImageRequest, Shape, from_table
from sdbatch.spec import JobSpec, parse_spec
from sdbatch.storage import open_store


@dataclass(frozen=True)
class Receipt:
    """What an actor hands back for a shard: numbers, no pixels."""

    shard: int
    committed: int
    quarantined: int
    failed_making: int  # of the quarantined, those that failed here and now
    batches: int  # that the model computed
    shape: Shape
    measured: Measured = field(default_factory=Measured)  # what these batches took
    made: int = 0  # of its requests, those that were made here and now


class Generator:
    """One model on one device, fed with shards. ``load`` comes first."""

    model: ImageModel

    def __init__(self, spec: dict[str, Any], job: Job, pen: Pen | None = None) -> None:
        self.spec: JobSpec = parse_spec(spec)
        self.job = job
        self._pen = pen or Pen()
        self._metrics = (
            ActorMetrics(self.spec.name, job.model_name) if pen is not None else None
        )  # outside the pool: none
        self._checked = tuple(check_columns(self.spec.checks))
        self.store = open_store(self.spec.output.uri)
        self._slice: tuple[int, Any] = (-1, None)
        self._made = 0
        self._longest = 0.0
        self._halted = threading.Event()
        self._drawn = set[Shape]()  # shapes that this process has warmed up to
        self._model_turn = threading.Lock()
        self._model_thread = ThreadPoolExecutor(1, "model")
        self._finishers = Finishers()
        self._newest: list[Future[dict[int, Ended]]] = []  # the last batch of all: it may still be on the device

    def load(self) -> dict[str, str]:
        """Load the model; returns the environment that pictures depend on."""
        self.model = self._model_thread.submit(load_model, self.spec, self._pen).result()
        if self.model.sha256 != self.job.model_sha256:
            raise ModelError(
                f"model '{self.spec.model.uri}' is another one on {platform.node()} than the job was planned with"
            )
        self._maker = BatchMaker(self.model, self.spec, self.spec.input.uri)
        measures = self._model_thread.submit(load_job_measures, self.spec).result()
        if measures is not None and measures.sha256 != self.job.deciding.get("check_models", {}):
            raise ModelError(f"a model of checks is another one on {platform.node()} than the job was planned with")
        self._chooser = None if measures is None else Chooser(measures, self.spec.resources.at_once)
        credentials = self.spec.output.c2pa
        self._signer = None if credentials is None else Signer(credentials, __version__)
        self.environment = {"sdbatch": __version__, "pillow": PIL.__version__, **self.model.environment}
        self._committer = ShardCommitter(self.store, self.spec, self.job, self.environment, self._signer)
        return self.environment

    def images_made(self) -> int:
        """Images that left the model so far; asked now and then for the progress bar."""
        if self._metrics is not None:
            self._metrics.look()
        return self._made

    def longest_batch(self) -> float:
        """Seconds from the beginning of a batch until it was stored, at most so far."""
        return self._longest

    def halt(self) -> None:
        """End with the batch in work: what is made of a shard stays and the rest is left, see ``run_shard``."""
        self._halted.set()

    def node(self) -> str:
        """The Ray node that it runs on."""
        return str(ray.get_runtime_context().get_node_id())

    def run_shard(self, shard: Shard, attempts: Attempts = UNTRIED) -> Receipt | None:
        """Make, store and commit a shard. What other writers have finished of it is taken as it is.

        ``attempts``: what it has cost so far, which tells the requests that are better made alone or not at all.
        None if it was halted before all batches were made: those that were are kept for whoever goes on.
        """
        started = time.perf_counter()
        record = self._committer.finish_started(shard)
        if record is not None:
            self._made += shard.count
            return Receipt(shard.number, record.committed, record.quarantined, 0, 0, shape_of(shard))
        requests = self._requests(shard)
        settled = self._settled(shard, requests)
        looks = looks_of({position: end.row for position, end in settled.items()})
        since = self._committer.retried(shard)
        size = self.spec.resources.at_once
        finishing: list[Future[dict[int, Ended]]] = []
        batches, seconds, measured = 0, {"model": 0.0}, Measured()
        with self._model_turn:
            for first in range(0, len(requests), size):
                if self._halted.is_set():
                    for stored in finishing:
                        stored.result()
                    self._pen.at(None)
                    return None
                turn = time.perf_counter()
                batch = {
                    position: request
                    for position, request in enumerate(requests[first : first + size], first)
                    if position not in settled
                }
                if batch:
                    # What is made so far shall outlive the death that may come, and never pile up.
                    suspect = attempts.suspect(first, batch)
                    wait([*finishing, *self._newest] if suspect else finishing[: -self._finishers.room])
                    began = time.perf_counter()
                    draw = partial(self._make_marked, shard, attempts, first)
                    made = self._model_thread.submit(self._choose, first, batch, draw, looks, since).result()
                    making = time.perf_counter() - began
                    seconds["model"] += making - made.seconds
                    self._tell("model", making - made.seconds)
                    if self._chooser is not None:
                        seconds["checks"] = seconds.get("checks", 0.0) + made.seconds
                        self._tell("checks", made.seconds)
                    batches += made.draws
                    last = first + size >= len(requests)
                    finishing.append(
                        self._finishers.submit(making, self._finish, shard, batch, made.results, last, turn)
                    )
                    self._newest = finishing[-1:]
                    measured = measured.plus(self._took(shape_of(shard), time.perf_counter() - turn))
                self._made += len(requests[first : first + size])
            self._pen.at(None)
        ends = {position: end for done in finishing for position, end in done.result().items()}
        ended = [end for _, end in sorted((settled | ends).items())]
        seconds["shard"] = time.perf_counter() - started
        began = time.perf_counter()
        record, copied = self._committer.commit(shard, ended, seconds, writer=uuid.uuid4().hex)
        self._tell("commit", time.perf_counter() - began)
        sizes = [len(end.picture.data) + copied[at] for at, end in ends.items() if end.picture is not None]
        measured = measured.plus(Measured(images=len(sizes), bytes=sum(sizes)))
        dropped = sum((end.row["error"] or "").startswith(DROPPED) for end in ends.values())
        failed, shape = len(ends) - len(sizes) - dropped, shape_of(shard)
        return Receipt(shard.number, record.committed, record.quarantined, failed, batches, shape, measured, len(ends))

    def measure(self, shard: Shard, batches: int) -> Measured:
        """Make so many batches of a shard and as many more as warm it up, encode them as a run does, store nothing."""
        requests, size, measured = self._requests(shard), self.spec.resources.at_once, Measured()
        starts, encoding = range(0, len(requests), size), list[Future[list[int]]]()
        for number in range(batches + 1):
            first = starts[number % len(starts)]
            batch = dict(enumerate(requests[first : first + size], first))
            turn = time.perf_counter()
            draw = partial(self._maker.make, first)
            made = self._model_thread.submit(self._choose, first, batch, draw, {}, {}).result()
            making = time.perf_counter() - turn
            encoding.append(self._finishers.submit(making, self._encoded_sizes, shard, batch, made.results))
            if number == batches:  # what a GPU draws it draws a batch behind: the last one's time is not over yet
                self._arrived(shard, made.results)
            measured = measured.plus(self._took(shape_of(shard), time.perf_counter() - turn))
        sizes = [size for one in encoding for size in one.result()]
        return measured.plus(Measured(images=len(sizes), bytes=sum(sizes)))

    def _took(self, shape: Shape, seconds: float) -> Measured:
        """One batch of a shape; this process's first counts by itself."""
        if shape in self._drawn:
            return Measured(batches=1, seconds=seconds)
        self._drawn.add(shape)
        return Measured(firsts=1, first_seconds=seconds)

    def _tell(self, stage: str, seconds: float) -> None:
        """Tell who measures that a stage is over."""
        if self._metrics is not None:
            self._metrics.stage(stage, seconds)

    def _settled(self, shard: Shard, requests: Sequence[ImageRequest]) -> dict[int, Ended]:
        """Position → what needs not be made: an earlier edition's, or what a writer who is gone had finished."""
        kept = self._committer.writer.kept(shard.stem)
        truncated = self.model.truncated([requests[position].prompt for position in kept])
        settled = self._committer.carried_over(shard)
        for (position, data), cut in zip(kept.items(), truncated, strict=True):
            checked = checked_columns(data, self._checked) if self._checked else {}
            if checked is not None:  # else it is made again
                row = metadata_row(self.job, shard.number, requests[position], truncated=cut) | checked
                settled[position] = Ended(row, EncodedPicture(position, row, data))
        return settled

    def made_again(self, shard: Shard, positions: Sequence[int], looks: Looks) -> dict[int, bytes | None]:
        """Make some of a shard's pictures again, each in its slot, and store nothing: bytes by position.

        ``looks``: of the shard's pictures, as its metadata tell them. None for a request that fails. Signed pictures
        come without their signatures.
        """
        requests, size = self._requests(shard), self.spec.resources.at_once
        since = self._committer.retried(shard)
        made: dict[int, bytes | None] = {}
        for first in range(0, len(requests), size):
            batch = {position: requests[position] for position in positions if first <= position < first + size}
            draw = partial(self._maker.make, first)
            choice = self._model_thread.submit(self._choose, first, batch, draw, dict(looks), since).result()
            for position, result in arrived(choice.results).items():
                made[position] = None
                if not isinstance(result, Refused):
                    row = metadata_row(self.job, shard.number, requests[position], truncated=result.truncated)
                    made[position] = self._encoded(result.pixels, shard, {**row, **result.columns})
        return made

    def checksums(self, shard: Shard, positions: Sequence[int], looks: Looks) -> dict[int, str | None]:
        """The sha256 of pictures made again, of a signed one that of its pixels: no two signatures are alike."""
        signed = self.spec.output.c2pa is not None
        return {
            at: None if data is None else pixels_sum(data) if signed else hashlib.sha256(data).hexdigest()
            for at, data in self.made_again(shard, positions, looks).items()
        }

    # -- one batch ---------------------------------------------------------------------------------------

    def _requests(self, shard: Shard) -> list[ImageRequest]:
        number, table = self._slice
        if number != shard.slice:
            table = read_slice(self.store, self.job, shard.slice)
            self._slice = (shard.slice, table)
        return from_table(table.slice(shard.offset, shard.count))

    def _choose(
        self,
        first: int,
        batch: Mapping[int, ImageRequest],
        draw: Draw,
        looks: dict[int, tuple[str, str]],
        since: Mapping[int, int],
    ) -> Choice:
        """A batch's pictures, with checks the best of those that ``draw`` makes."""
        try:
            if self._chooser is None:
                return Choice(draw(batch), draws=1, seconds=0.0)
            return self._chooser.choose(first, batch, draw, looks, since)
        except self.model.memory_errors:  # a batch that does not fit is told by its maker
            raise JobFailed(
                "checks: their models find no room on the device beside a batch; lower resources.batch_size"
            ) from None
        except self.model.device_errors:  # of a picture that was waited for
            end_process()

    def _make_marked(
        self, shard: Shard, attempts: Attempts, first: int, batch: Mapping[int, ImageRequest]
    ) -> Mapping[int, Result | Coming]:
        """A batch's pictures, what is in work told before. Of a suspect batch each request is made by itself."""
        if not attempts.suspect(first, batch):
            self._pen.at(Mark(shard.stem, first, alone=False))
            return self._maker.make(first, batch)
        results: dict[int, Result] = {}
        for position, request in batch.items():
            killer = attempts.killer(position, self.spec.failures.max_attempts)
            if killer is not None:
                results[position] = Refused(killer)
                continue
            self._pen.at(Mark(shard.stem, position, alone=True))
            results |= arrived(self._maker.make(first, {position: request}))
        return results

    # -- after the model ---------------------------------------------------------------------------------

    def _encoded(self, pixels: np.ndarray, shard: Shard, row: dict[str, Any]) -> bytes:
        """The picture's bytes, unsigned. They tell the fingerprint of its part of the plan: no extension changes it."""
        fingerprint = self.job.part_of_slice(shard.slice).fingerprint
        return encode(pixels, self.spec.output.image, row, fingerprint, self._checked)

    def _finish(
        self,
        shard: Shard,
        batch: Mapping[int, ImageRequest],
        results: Mapping[int, Result | Coming],
        last: bool,
        begun: float,
    ) -> dict[int, Ended]:
        """Encode the pictures of a batch and make them outlive this process."""
        there = self._arrived(shard, results)
        began = time.perf_counter()
        rows, pictures = self._as_files(shard, batch, there)
        kept = self._committer.writer.keep(shard.stem, pictures, last=last)
        self._tell("finish", time.perf_counter() - began)
        if kept and not last:  # the last ones outlive it only with the whole shard
            self._pen.kept()
        self._longest = max(self._longest, time.perf_counter() - begun)
        by_position = {picture.position: picture for picture in kept}
        ours = {picture.position: picture.data for picture in pictures}
        for position, picture in by_position.items():
            if self._checked and picture.data != ours[position]:  # another writer's
                rows[position] |= checked_columns(picture.data, self._checked) or {}
        return {position: Ended(row, by_position.get(position)) for position, row in rows.items()}

    def _arrived(self, shard: Shard, results: Mapping[int, Result | Coming]) -> dict[int, Result]:
        """All results, when they are there. Where the device failed only a new process gets it back."""
        try:
            return arrived(results)
        except self.model.device_errors:
            size = self.spec.resources.at_once
            self._pen.at(Mark(shard.stem, min(results) // size * size, alone=False))  # the model is a batch ahead
            os._exit(1)

    def _as_files(
        self, shard: Shard, batch: Mapping[int, ImageRequest], results: Mapping[int, Result]
    ) -> tuple[dict[int, dict[str, Any]], list[EncodedPicture]]:
        """Position → metadata row, and the pictures as files, of a batch that the model made."""
        rows, pictures = {}, []
        for position, request in batch.items():
            result = results[position]
            if isinstance(result, Refused):
                rows[position] = {**metadata_row(self.job, shard.number, request, error=result.error), **result.columns}
                continue
            row = {**metadata_row(self.job, shard.number, request, truncated=result.truncated), **result.columns}
            try:
                data = self._encoded(result.pixels, shard, row)
                if self._signer is not None:
                    data = self._signer.signed(data, self.spec.output.image.type, row)
                pictures.append(EncodedPicture(position, row, data))
            except (OSError, ValueError) as error:  # too large for its format, say
                told = f"the picture can't be encoded as {self.spec.output.image.type}: {error}"
                row = {**metadata_row(self.job, shard.number, request, error=told), **result.columns}
            rows[position] = row
        return rows, pictures

    def _encoded_sizes(
        self, shard: Shard, batch: Mapping[int, ImageRequest], results: Mapping[int, Result | Coming]
    ) -> list[int]:
        """The bytes of each picture of a batch, with its copies."""
        _, pictures = self._as_files(shard, batch, self._arrived(shard, results))
        return [sum(len(one.data) for one in (made, *self._committer.copies_of(shard, made))) for made in pictures]


def looks_of(rows: Mapping[int, Mapping[str, Any]]) -> dict[int, tuple[str, str]]:
    """Position → image_id and perceptual hash of the pictures among these metadata rows that have one."""
    return {
        position: (row["image_id"], row["phash"])
        for position, row in rows.items()
        if row["status"] == "committed" and row.get("phash")
    }
