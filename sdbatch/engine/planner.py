"""Planning: from a job spec to the immutable plan in its output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import PIL
import pyarrow as pa
import torch

from sdbatch import __version__
from sdbatch.diffusion import SAMPLERS
from sdbatch.diffusion.prompt import chunks_needed
from sdbatch.diffusion.samplers import most_steps
from sdbatch.engine.models import FoundModel, find_model, located
from sdbatch.engine.reading import check_columns, read_slices
from sdbatch.errors import InputError, OutputError, StorageError, UsageError
from sdbatch.ledger import Job, Shard, find_job, job_fingerprint, refuse_changes, write_job, write_slice
from sdbatch.prompts import (
    ImageRequest,
    ModelFacts,
    OddSize,
    RowIds,
    Run,
    Table,
    changed_files,
    cut,
    find_table,
    odd_sizes,
    requests_of_slice,
    to_table,
)
from sdbatch.spec import JobSpec
from sdbatch.storage import Store, open_store

_SHOWN = 5


@dataclass(frozen=True)
class Prepared:
    """A spec whose model, input and output were found to be there; nothing has been done yet."""

    spec: JobSpec
    model: FoundModel
    table: Table
    store: Store

    @property
    def located(self) -> JobSpec:
        """The spec with its model and output where any process finds them: actors have folders of their own.

        ``input.uri`` becomes the folder that relative paths of rows begin at; the table itself is planned by then.
        """
        first = self.table.files[0]
        base = first.uri.removesuffix(f"/{first.name}")
        return self.spec.model_copy(
            update={
                "input": self.spec.input.model_copy(update={"uri": base}),
                "model": located(self.spec.model, self.model),
                "output": self.spec.output.model_copy(update={"uri": self.store.uri}),
            }
        )


def prepare(spec: JobSpec) -> Prepared:
    """Look up everything that the spec names. Raises ModelError, InputError or OutputError."""
    model = find_model(spec.model)
    most = min(encoder.config.num_hidden_layers for encoder in model.checkpoint.text_encoders) - 1
    if spec.generate.clip_skip > most:
        raise UsageError(f"generate.clip_skip: is {spec.generate.clip_skip}; this model allows at most {most}")
    table = find_table(spec.input)
    check_columns(spec.input, table)
    return Prepared(spec, model, table, open_output(spec))


def open_output(spec: JobSpec) -> Store:
    """The output's store, tried out by writing to it. Raises OutputError if it can't be used."""
    try:
        store = open_store(spec.output.uri)
        store.delete("_sdbatch/probe")
        store.put_if_absent("_sdbatch/probe", b"may this be written?\n")
        store.delete("_sdbatch/probe")
        foreign = next(iter(store.list("data/")), None) if find_job(store) is None else None
    except StorageError as error:
        raise OutputError(f"output.uri: {error}") from None
    if foreign is not None:
        raise OutputError(f"output.uri: {store.uri} holds {foreign.key} but no job; choose an empty output")
    return store


def find_plan(prepared: Prepared) -> Job | None:
    """The plan that stands in the output, if any. Raises PlanChanged when it was made from something else."""
    job = find_job(prepared.store)
    if job is not None:
        _refuse_changes(prepared, job)
    return job


def _refuse_changes(prepared: Prepared, job: Job) -> None:
    changes = changed_files(job.input_files, prepared.table)
    refuse_changes(job, prepared.spec.deciding(), prepared.model.sha256, changes, prepared.store.uri)


def make_plan(prepared: Prepared, on_rows: Callable[[int], None]) -> Job:
    """Read the table through Ray Data and write the plan; ``on_rows`` hears how many rows have been read.

    A pure function of spec, input and model. Raises InputError, and leaves no plan, when sizes don't fit.
    """
    spec, store = prepared.spec, prepared.store
    checkpoint = prepared.model.checkpoint
    versions = [file.version for file in prepared.table.files]
    fingerprint = job_fingerprint(spec.deciding(), versions, prepared.model.sha256)
    ids, sizes, shards, slices = RowIds("id" in spec.input.columns), _OddSizes(), list[Shard](), 0
    facts = ModelFacts(
        checkpoint.default_size,
        repaints=checkpoint.unet.config.in_channels == 9,
        most_steps={name: most_steps(name, checkpoint.schedule) for name in SAMPLERS},
    )
    rows_read = planned = faulty = 0
    first_fault: str | None = None
    for rows in read_slices(spec.input, prepared.table):
        requests = requests_of_slice(rows, rows_read, spec, facts, ids)
        sizes.add(odd_sizes(requests, rows_read))
        rows_read += len(rows)
        on_rows(rows_read)
        if sizes.count:
            continue  # no plan will come of it, but the rest is counted
        if spec.generate.long_prompts == "chunk":
            requests = _in_chunks(requests, prepared)
        runs = cut(requests, spec.output.shard_size)
        shards += _shards_of(runs, first=len(shards), number=slices)
        grouped = [request for run in runs for request in run.requests]
        write_slice(store, fingerprint, slices, to_table(grouped, spec.input.kept))
        slices += 1
        planned += len(requests)
        faults = [request.fault for request in requests if request.fault is not None]
        faulty += len(faults)
        first_fault = first_fault or next(iter(faults), None)
    sizes.refuse(rows_read)
    if not planned:
        raise InputError(f"input.uri: {spec.input.uri} has no rows")
    if faulty == planned:
        raise InputError(f"input.uri: {spec.input.uri}: of {planned:,} images none can be made; {first_fault}")
    job = Job(
        spec=spec.model_dump(mode="json"),
        deciding=spec.deciding(),
        input_files=[
            {"name": file.name, "bytes": file.bytes, "version": file.version} for file in prepared.table.files
        ],
        model_sha256=prepared.model.sha256,
        versions={
            "sdbatch": __version__,
            "torch": str(torch.__version__),
            "pyarrow": pa.__version__,
            "pillow": PIL.__version__,
        },
        planned=planned,
        faulty=faulty,
        shards=len(shards),
    )
    standing = write_job(store, job, shards)
    _refuse_changes(prepared, standing)  # another driver may have planned something else meanwhile
    return standing


def _in_chunks(requests: Sequence[ImageRequest], prepared: Prepared) -> list[ImageRequest]:
    """Each request with as many chunks as its prompts need: part of its shape, so that no neighbour changes it."""
    texts = [text for request in requests for text in (request.prompt, request.negative_prompt)]
    emphasis = prepared.spec.generate.emphasis
    by_encoder = [chunks_needed(t, texts, emphasis=emphasis) for t in prepared.model.checkpoint.tokenizers]
    counts = [max(of_text) for of_text in zip(*by_encoder, strict=True)]
    both = zip(counts[::2], counts[1::2], strict=True)
    return [replace(request, chunks=max(pair)) for request, pair in zip(requests, both, strict=True)]


class _OddSizes:
    """Counts the rows whose size the model can't draw, and remembers the first few."""

    def __init__(self) -> None:
        self.count = 0
        self._first: list[OddSize] = []

    def add(self, found: Iterable[OddSize]) -> None:
        for size in found:
            self.count += 1
            if len(self._first) < _SHOWN:
                self._first.append(size)

    def refuse(self, rows: int) -> None:
        """Raise InputError if there are any."""
        if self.count:
            shown = ", ".join(f"row {size.row + 1}: {size.width}x{size.height}" for size in self._first)
            raise InputError(
                f"input: {self.count:,} of {rows:,} rows have a width or height that is no multiple of 8 ({shown}"
                f"{', …' if self.count > _SHOWN else ''}); set generate.round_size to nearest, down or up to round them"
            )


def _shards_of(runs: list[Run], first: int, number: int) -> list[Shard]:
    """Where each run lies in slice ``number``, which holds the runs one after the other."""
    shards, offset = [], 0
    for at, run in enumerate(runs, first):
        lead = run.shape or run.requests[0].shape
        shards.append(
            Shard(
                number=at,
                slice=number,
                offset=offset,
                count=len(run.requests),
                makeable=run.shape is not None,
                **asdict(lead),
            )
        )
        offset += len(run.requests)
    return shards
