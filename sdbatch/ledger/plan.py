"""The plan: all image requests of a job in shards, immutable once it is there.

    _sdbatch/plan/FINGERPRINT/requests-00000.parquet   a slice of the table: its requests, shard after shard
    _sdbatch/plan/FINGERPRINT/slices.parquet           one row a slice: how many rows of the table, and their sha256
    _sdbatch/plan/FINGERPRINT/shards.parquet           one row a shard: where its requests lie, and their shape
    _sdbatch/job.yaml                                  the frozen spec and what the plan was made from; written last
    _sdbatch/extensions/0001.yaml                      the same anew, with the rows that the table had grown by

Planners of different jobs write side by side; the one whose ``job.yaml`` is first has the output. An extension plans
the new rows alone, in a folder of its own; numbers of slices and shards go on. Again the first to write it decides.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from sdbatch.errors import ObjectNotFound, OutputError, PlanChanged, StorageError
from sdbatch.spec import Model
from sdbatch.storage import Store
from sdbatch.storage.parquet import read_parquet

JOB_KEY = "_sdbatch/job.yaml"
_EXTENSIONS = "_sdbatch/extensions/"
#: Shards that are turned into objects at once.
_AT_ONCE = 1024


@dataclass(frozen=True)
class Shard:
    """Where a shard's requests lie in the plan. ``makeable`` is False for requests that can't be made.

    What is made again of a committed shard is a new ``edition`` of it, stored beside the one before.
    """

    number: int
    slice: int
    offset: int
    count: int
    makeable: bool
    width: int
    height: int
    num_inference_steps: int
    sampler: str
    guided: bool
    chunks: int
    strength: float | None
    masked: bool
    edition: int = 1

    @property
    def stem(self) -> str:
        """What the keys of its objects have in common."""
        return shard_stem(self.number, self.edition)


def shard_stem(number: int, edition: int = 1) -> str:
    return f"{number:07d}" if edition == 1 else f"{number:07d}r{edition}"


_SHARD_SCHEMA = pa.schema(
    [
        ("number", pa.int32()),
        ("slice", pa.int32()),
        ("offset", pa.int32()),
        ("count", pa.int32()),
        ("makeable", pa.bool_()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("num_inference_steps", pa.int32()),
        ("sampler", pa.string()),
        ("guided", pa.bool_()),
        ("chunks", pa.int32()),
        ("strength", pa.float64()),
        ("masked", pa.bool_()),
    ]
)
_ROWS_SCHEMA = pa.schema([("rows", pa.int32()), ("sha256", pa.string())])


class Shards:
    """Many shards in an Arrow table: an object is made of each only as it is come to."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    @classmethod
    def of(cls, shards: Iterable[Shard]) -> Shards:
        """All first editions: another one is no part of a plan."""
        return cls(pa.Table.from_pylist([asdict(shard) for shard in shards], schema=_SHARD_SCHEMA))

    @classmethod
    def joined(cls, parts: Iterable[Shards]) -> Shards:
        return cls(pa.concat_tables([_SHARD_SCHEMA.empty_table(), *(part.table for part in parts)]).combine_chunks())

    def numbered(self, first: int, slice_number: int) -> Shards:
        """A slice's shards under the numbers that they have in the plan."""
        numbers = pa.array(np.arange(first, first + len(self), dtype=np.int32))
        slices = pa.array(np.full(len(self), slice_number, np.int32))
        table = self.table.set_column(0, _SHARD_SCHEMA.field("number"), numbers)
        return Shards(table.set_column(1, _SHARD_SCHEMA.field("slice"), slices))

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[Shard]:
        for start in range(0, len(self), _AT_ONCE):
            for row in self.table.slice(start, _AT_ONCE).to_pylist():
                yield Shard(**row)

    @property
    def images(self) -> int:
        return int(self.column("count").sum())

    def column(self, name: str) -> np.ndarray:
        """A column of numbers or truths, one a shard."""
        values: np.ndarray = self.table.column(name).to_numpy()
        return values

    def of_slice(self, number: int) -> Shards:
        """The shards of one slice: they lie side by side."""
        first, end = np.searchsorted(self.column("slice"), [number, number + 1])
        return Shards(self.table.slice(first, end - first))

    def makeable(self, makeable: bool = True) -> Shards:
        """Those that can be made, or those that can't."""
        return self.where(self.column("makeable") == makeable)

    def counted(self, *columns: str) -> list[tuple[Any, ...]]:
        """Each combination of values in these columns, with the number of its images."""
        sums = self.table.group_by(list(columns)).aggregate([("count", "sum")])
        return [tuple(row.values()) for row in sums.to_pylist()]

    def where(self, chosen: np.ndarray) -> Shards:
        """The shards for which ``chosen``, one truth a shard, is true."""
        return Shards(self.table.filter(pa.array(chosen)))


@dataclass(frozen=True)
class SliceRows:
    """How many rows of the table a slice was made from, and a digest of what they held."""

    rows: int
    sha256: str


@dataclass(frozen=True)
class Part:
    """A folder of the plan: the rows that were planned at once, first or by an extension."""

    fingerprint: str
    rows: int
    slices: int
    shards: int
    planned: int
    faulty: int


@dataclass(frozen=True)
class Job:
    """What ``job.yaml`` holds. ``deciding`` is the part of the spec that a resume may not change.

    ``parts`` are in the order of their rows; numbers of slices and shards count on from one to the next.
    """

    spec: dict[str, Any]
    deciding: dict[str, Any]
    input_files: list[dict[str, Any]]
    model_sha256: str
    versions: dict[str, str]
    parts: tuple[Part, ...]

    @property
    def rows(self) -> int:
        """Rows of the table that are planned."""
        return sum(part.rows for part in self.parts)

    @property
    def slices(self) -> int:
        return sum(part.slices for part in self.parts)

    @property
    def shards(self) -> int:
        return sum(part.shards for part in self.parts)

    @property
    def planned(self) -> int:
        """Image requests; ``faulty`` of them can't be made."""
        return sum(part.planned for part in self.parts)

    @property
    def faulty(self) -> int:
        return sum(part.faulty for part in self.parts)

    def part_of_slice(self, number: int) -> Part:
        """Where a slice lies. Commit records of its shards carry the part's fingerprint."""
        end = 0
        for part in self.parts:
            end += part.slices
            if number < end:
                return part
        raise IndexError(f"the plan has {end} slices and no slice {number}")

    @cached_property
    def model_name(self) -> str:
        """What results call the model: as it was planned, wherever it lies now."""
        return Model.model_validate(self.spec["model"]).name

    @property
    def fingerprint(self) -> str:
        """One word for everything that decides what the job makes."""
        return self.parts[-1].fingerprint


def part_fingerprint(
    deciding: dict[str, Any], file_versions: list[str], model_sha256: str, before: Sequence[Part] = ()
) -> str:
    """One word for everything that decides what a part holds, the parts before it included."""
    decides = [deciding, file_versions, model_sha256, *(part.fingerprint for part in before)]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _key(fingerprint: str, name: str) -> str:
    return f"_sdbatch/plan/{fingerprint[:16]}/{name}.parquet"


def _write(store: Store, fingerprint: str, name: str, table: pa.Table) -> None:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    store.put(_key(fingerprint, name), buffer.getvalue())


def _read(store: Store, fingerprint: str, name: str) -> pa.Table:
    key = _key(fingerprint, name)
    try:
        return read_parquet(store.get(key), checksums=True)
    except (pa.ArrowException, OSError) as error:
        told = " ".join(str(error).split())
        raise StorageError(f"{store.uri}/{key} is damaged: {told}; put it back, or start in a new output") from None


def write_slice(store: Store, fingerprint: str, number: int, requests: pa.Table) -> None:
    _write(store, fingerprint, f"requests-{number:05d}", requests)


def read_slice(store: Store, job: Job, number: int) -> pa.Table:
    """The requests of a slice; a shard's are ``table.slice(shard.offset, shard.count)``."""
    return _read(store, job.part_of_slice(number).fingerprint, f"requests-{number:05d}")


def write_slice_rows(store: Store, fingerprint: str, slices: Sequence[SliceRows]) -> None:
    """Keep what the slices of a part were made from, for extensions to compare."""
    _write(store, fingerprint, "slices", pa.Table.from_pylist([asdict(rows) for rows in slices], schema=_ROWS_SCHEMA))


def read_slice_rows(store: Store, job: Job) -> list[SliceRows]:
    """What every slice of the plan was made from."""
    parts = [_read(store, part.fingerprint, "slices").to_pylist() for part in job.parts]
    return [SliceRows(**row) for rows in parts for row in rows]


def write_job(store: Store, job: Job, shards: Shards) -> Job:
    """Finish the plan, or its last part, whose ``shards`` these are.

    Of two drivers that plan at once the first decides; returns the job that stands.
    """
    _write(store, job.parts[-1].fingerprint, "shards", shards.table)
    content = {"fingerprint": job.fingerprint, **asdict(job)}
    key = JOB_KEY if len(job.parts) == 1 else f"{_EXTENSIONS}{len(job.parts) - 1:04d}.yaml"
    store.put_if_absent(key, yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode())
    return read_job(store)


def read_job(store: Store) -> Job:
    """The job planned in this output. Raises OutputError where there is none."""
    job = find_job(store)
    if job is None:
        raise OutputError(f"{store.uri} holds no job; name the output of 'sdbatch run'")
    return job


def find_job(store: Store) -> Job | None:
    """The job planned in this output, with all its extensions, if any."""
    key = max((entry.key for entry in store.list(_EXTENSIONS)), default=JOB_KEY)
    try:
        data = store.get(key)
    except ObjectNotFound:
        return None
    try:
        content = yaml.safe_load(data)
        del content["fingerprint"]
        return Job(**content | {"parts": tuple(Part(**part) for part in content["parts"])})
    except (TypeError, KeyError, yaml.YAMLError) as error:
        raise OutputError(f"{store.uri}/{key} is damaged: {error}") from None


def read_shards(store: Store, job: Job) -> Shards:
    """All shards of the plan, in the order of their numbers."""
    return Shards.joined(Shards(_read(store, part.fingerprint, "shards")) for part in job.parts)


def refuse_changes(job: Job, deciding: dict[str, Any], model_sha256: str, input_changes: list[str], uri: str) -> None:
    """Raise PlanChanged, with the differences, unless the job is the one that the output was planned from."""
    told = [f"{field}: {_show(old)} → {_show(new)}" for field, old, new in _differences(job.deciding, deciding)]
    told += input_changes
    if model_sha256 != job.model_sha256:
        told.append(f"model: sha256 {job.model_sha256[:12]}… → {model_sha256[:12]}…")
    if told:
        remedy = "put back what changed to resume, or choose another output.uri"
        if told == input_changes:
            remedy += "; rows that were only added at the end are planned by --extend"
        raise PlanChanged(f"{uri} was planned from something else:\n  " + "\n  ".join(told) + f"\n{remedy}")


def _differences(old: Any, new: Any, field: str = "") -> list[tuple[str, Any, Any]]:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return [] if old == new else [(field, old, new)]
    found: list[tuple[str, Any, Any]] = []
    for key in sorted({*old, *new}):
        found += _differences(old.get(key), new.get(key), f"{field}.{key}".lstrip("."))
    return found


def _show(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value, ensure_ascii=False)
