"""Planning: from a job spec to the immutable plan in its output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import islice
from typing import Any

import PIL
import pyarrow as pa

from sdbatch import __version__
from sdbatch.checks import FoundChecks
from sdbatch.engine.models.image_model import FoundModel
from sdbatch.engine.models.loading import find_job_checks, find_model, located, located_checks
from sdbatch.engine.planning.batching import decided
from sdbatch.engine.planning.ids import ID_ROWS, Doubles, find_doubles
from sdbatch.engine.planning.number_format import check_computing, with_format
from sdbatch.engine.planning.reading import check_columns, read_ids, read_slices
from sdbatch.engine.planning.slices import SHOWN, PlannedSlice, Planning, slices_digested, slices_planned
from sdbatch.errors import InputError, OutputError, UsageError, told_of
from sdbatch.ledger import (
    Job,
    Part,
    Shards,
    SliceRows,
    find_job,
    part_fingerprint,
    read_slice_rows,
    refuse_changes,
    write_job,
    write_slice_rows,
)
from sdbatch.outputs import Signer, misfits
from sdbatch.prompts import (
    ImageRequest,
    OddSize,
    RowIds,
    Table,
    WildcardFiles,
    changed_files,
    check_prompts,
    doubled_ids,
    find_table,
    images_a_row,
    read_wildcards,
    requests_of_slice,
    unlike_growth,
    usable_ids,
)
from sdbatch.spec import JobSpec
from sdbatch.storage import Store, open_store


@dataclass(frozen=True)
class Prepared:
    """A spec whose model, input and output were found to be there; nothing has been done yet."""

    spec: JobSpec
    model: FoundModel
    table: Table
    store: Store
    wildcards: WildcardFiles
    checks: FoundChecks

    def deciding(self) -> dict[str, Any]:
        """What a resumed job may not change, beside its table and its model."""
        sums = {"wildcards": self.wildcards.sha256, "check_models": self.checks.sha256}
        return self.spec.deciding() | {name: found for name, found in sums.items() if found}

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
                "checks": located_checks(self.spec.checks, self.checks),
                "output": self.spec.output.model_copy(update={"uri": self.store.uri}),
            }
        )


def prepare(spec: JobSpec) -> Prepared:
    """Look up everything that the spec names. Raises ModelError, InputError or OutputError, or StoreAway."""
    check_computing(spec)
    model = find_model(spec.model)
    if spec.generate.clip_skip > model.most_clip_skip:
        raise UsageError(
            f"generate.clip_skip: is {spec.generate.clip_skip}; this model allows at most {model.most_clip_skip}"
        )
    checks = find_job_checks(spec)
    if spec.output.c2pa is not None:
        Signer(spec.output.c2pa, __version__)
    table = find_table(spec.input)
    wanted = check_columns(spec, table)
    wildcards = WildcardFiles() if spec.prompt.wildcards is None else read_wildcards(spec.prompt)
    check_prompts(spec, wildcards.lines, wanted)
    store = open_output(spec)
    standing = find_job(store)
    spec = decided(with_format(spec, standing), model.facts, standing)
    return Prepared(spec, model, table, store, wildcards, checks)


def open_output(spec: JobSpec) -> Store:
    """The output's store, tried out by writing to it. Raises OutputError if it can't be used."""
    with told_of("output.uri", OutputError):
        store = open_store(spec.output.uri)
        store.delete("_sdbatch/probe")
        store.put_if_absent("_sdbatch/probe", b"may this be written?\n")
        store.delete("_sdbatch/probe")
        foreign = next(iter(store.list("data/")), None) if find_job(store) is None else None
    if foreign is not None:
        raise OutputError(f"output.uri: {store.uri} holds {foreign.key} but no job; choose an empty output")
    return store


def find_plan(prepared: Prepared, extend: bool = False) -> Job | None:
    """The plan that stands in the output, if any. Raises PlanChanged when it was made from something else.

    With ``extend`` the table may be one that has grown, as far as its files can tell.
    """
    job = find_job(prepared.store)
    if job is not None:
        _refuse_changes(prepared, job, (unlike_growth if extend else changed_files)(job.input_files, prepared.table))
    return job


def input_changed(prepared: Prepared, job: Job) -> bool:
    """Is any file of the table not as it was when the job was planned?"""
    return bool(changed_files(job.input_files, prepared.table))


def _refuse_changes(prepared: Prepared, job: Job, changes: list[str]) -> None:
    refuse_changes(job, prepared.deciding(), prepared.model.sha256, changes, prepared.store.uri)


def make_plan(prepared: Prepared, on_rows: Callable[[int], None]) -> Job:
    """Read the table through Ray Data and write the plan; ``on_rows`` hears how many rows have been planned.

    A pure function of spec, input and model. Raises InputError, and leaves no plan, when sizes don't fit.
    """
    doubles, source = _find_doubles(prepared), prepared.spec.input
    part, shards, first_fault = _plan_part(prepared, (), _slices(prepared), doubles, on_rows)
    if not part.planned:
        raise InputError(f"input.uri: {source.uri} has no rows")
    if part.faulty == part.planned:
        raise InputError(f"input.uri: {source.uri}: of {part.planned:,} images none can be made; {first_fault}")
    return _write_job(prepared, (part,), shards)


def extend_plan(prepared: Prepared, job: Job, on_rows: Callable[[int], None]) -> Job:
    """Plan the rows by which the table has grown since; the ``job`` itself where there are none.

    Raises PlanChanged unless all rows that were planned are still there as they were, before the new ones.
    """
    planned, doubles = read_slice_rows(prepared.store, job), _find_doubles(prepared)
    slices = _slices(prepared, [rows.rows for rows in planned])
    found = slices_digested(islice(slices, len(planned)))
    row = 0
    for before in planned:
        now = next(found, SliceRows(0, ""))
        if now != before:
            told = f"input: rows {row + 1:,} to {row + before.rows:,} are no longer those that were planned"
            if now.rows < before.rows:
                told = f"input: ends after row {row + now.rows:,}; {job.rows:,} rows were planned"
            _refuse_changes(prepared, job, [told])
        row += before.rows
        on_rows(row)
    part, shards, _ = _plan_part(prepared, job.parts, slices, doubles, on_rows)
    return _write_job(prepared, (*job.parts, part), shards) if part.rows else job


def _slices(prepared: Prepared, planned: Sequence[int] = ()) -> Iterator[pa.Table]:
    """The table, slice by slice, those that are ``planned`` already with as many rows as then."""
    images = images_a_row(prepared.spec, prepared.wildcards.lines)
    return read_slices(prepared.spec, prepared.table, planned, images)


def first_requests(prepared: Prepared, count: int) -> list[ImageRequest]:
    """The first requests of the plan in the order of the table; what the plan holds lies shape by shape.

    They are made anew from as many rows as that takes, for the plan is a pure function of them. Needs Ray.
    """
    source = prepared.spec.input
    head = source.model_copy(update={"limit": min(count, source.limit or count)})
    spec = prepared.spec.model_copy(update={"input": head})
    rows = pa.concat_tables(read_slices(spec, prepared.table))
    mapped, doubles = "id" in source.columns, dict[int, int]()
    if mapped:  # the first row that has an id comes before the others that do
        found = doubled_ids(usable_ids(rows.column("id"), 0))[1]
        doubles = dict(zip(found.column("row").to_pylist(), found.column("first").to_pylist(), strict=True))
    ids, facts = RowIds(mapped, doubles), prepared.model.facts
    return list(islice(requests_of_slice(rows.to_pylist(), 0, spec, facts, ids, prepared.wildcards.lines), count))


def _find_doubles(prepared: Prepared) -> Doubles:
    source = prepared.spec.input
    return find_doubles(read_ids(source, prepared.table, ID_ROWS)) if "id" in source.columns else Doubles({})


def _plan_part(
    prepared: Prepared,
    before: Sequence[Part],
    slices: Iterable[pa.Table],
    doubles: Doubles,
    on_rows: Callable[[int], None],
) -> tuple[Part, Shards, str | None]:
    """Plan the slices that come after those of the parts ``before``: their part, shards and first fault."""
    spec, store = prepared.spec, prepared.store
    versions = [file.version for file in prepared.table.files]
    fingerprint = part_fingerprint(prepared.deciding(), versions, prepared.model.sha256, before)
    first_row, first_slice = sum(part.rows for part in before), sum(part.slices for part in before)
    first_shard = sum(part.shards for part in before)
    part = Part(fingerprint, rows=0, slices=0, shards=0, planned=0, faulty=0)
    sizes, shards, made_from = _OddSizes(), list[Shards](), list[SliceRows]()
    first_fault: str | None = None
    reads = spec.generate.long_prompts == "chunk"
    model = prepared.model if reads else replace(prepared.model, tokenizers=())  # with them comes torch, for seconds
    planning = Planning(spec, model, store.uri, fingerprint, prepared.wildcards.lines)
    for found in slices_planned(planning, slices, first_slice, first_row, doubles):
        sizes.add(found)
        shards.append(found.shards.numbered(first_shard + part.shards, first_slice + part.slices))
        made_from.append(found.rows)
        first_fault = first_fault or found.first_fault
        part = Part(
            fingerprint,
            part.rows + found.rows.rows,
            part.slices + 1,
            part.shards + len(found.shards),
            part.planned + found.planned,
            part.faulty + found.faulty,
        )
        on_rows(first_row + part.rows)
    sizes.refuse(part.rows)
    all_shards = Shards.joined(shards)
    for width, height, _ in sorted(all_shards.makeable().counted("width", "height")):
        for told in misfits(spec.output, (width, height)):
            raise UsageError(told)
    if part.rows:
        write_slice_rows(store, fingerprint, made_from)
    return part, all_shards, first_fault


def _write_job(prepared: Prepared, parts: tuple[Part, ...], shards: Shards) -> Job:
    """Finish the plan, whose last part has these shards. Raises PlanChanged if another driver has planned otherwise."""
    job = Job(
        spec=prepared.spec.model_dump(mode="json"),
        deciding=prepared.deciding(),
        input_files=[file.told() for file in prepared.table.files],
        model_sha256=prepared.model.sha256,
        versions={
            "sdbatch": __version__,
            "torch": version("torch"),
            "pyarrow": pa.__version__,
            "pillow": PIL.__version__,
        },
        parts=parts,
    )
    standing = write_job(prepared.store, job, shards)
    _refuse_changes(prepared, standing, changed_files(standing.input_files, prepared.table))
    return standing


class _OddSizes:
    """Counts the rows whose size the model can't draw, and remembers the first few."""

    def __init__(self) -> None:
        self.count = 0
        self._first: list[OddSize] = []

    def add(self, found: PlannedSlice) -> None:
        self.count += found.odd
        self._first += found.first_odd[: SHOWN - len(self._first)]

    def refuse(self, rows: int) -> None:
        """Raise InputError if there are any."""
        if self.count:
            shown = ", ".join(f"row {size.row + 1}: {size.width}x{size.height}" for size in self._first)
            raise InputError(
                f"input: {self.count:,} of {rows:,} rows have a width or height that is no multiple of 8 ({shown}"
                f"{', …' if self.count > SHOWN else ''}); set generate.round_size to nearest, down or up to round them"
            )
