"""The plan: all image requests of a job in shards, immutable once it is there.

    _sdbatch/plan/FINGERPRINT/requests-00000.parquet   a slice of the table: its requests, shard after shard
    _sdbatch/plan/FINGERPRINT/shards.parquet           one row a shard: where its requests lie, and their shape
    _sdbatch/job.yaml                                  the frozen spec and what the plan was made from; written last

Planners of different jobs write side by side; the one whose ``job.yaml`` is first has the output.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from sdbatch.errors import ObjectNotFound, OutputError, PlanChanged
from sdbatch.spec import Model
from sdbatch.storage import Store

JOB_KEY = "_sdbatch/job.yaml"


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


@dataclass(frozen=True)
class Job:
    """What ``job.yaml`` holds. ``deciding`` is the part of the spec that a resume may not change."""

    spec: dict[str, Any]
    deciding: dict[str, Any]
    input_files: list[dict[str, Any]]
    model_sha256: str
    versions: dict[str, str]
    planned: int
    faulty: int
    shards: int

    @cached_property
    def model_name(self) -> str:
        """What results call the model: as it was planned, wherever it lies now."""
        return Model.model_validate(self.spec["model"]).name

    @property
    def fingerprint(self) -> str:
        """One word for everything that decides what the job makes."""
        return job_fingerprint(self.deciding, [file["version"] for file in self.input_files], self.model_sha256)


def job_fingerprint(deciding: dict[str, Any], file_versions: list[str], model_sha256: str) -> str:
    decides = [deciding, file_versions, model_sha256]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _key(fingerprint: str, name: str) -> str:
    return f"_sdbatch/plan/{fingerprint[:16]}/{name}.parquet"


def write_slice(store: Store, fingerprint: str, number: int, requests: pa.Table) -> None:
    buffer = io.BytesIO()
    pq.write_table(requests, buffer, compression="zstd")
    store.put(_key(fingerprint, f"requests-{number:05d}"), buffer.getvalue())


def read_slice(store: Store, job: Job, number: int) -> pa.Table:
    """The requests of a slice; a shard's are ``table.slice(shard.offset, shard.count)``."""
    return pq.read_table(io.BytesIO(store.get(_key(job.fingerprint, f"requests-{number:05d}"))))


def write_job(store: Store, job: Job, shards: Iterable[Shard]) -> Job:
    """Finish the plan. Of two drivers that plan at once the first decides; returns the job that stands."""
    buffer = io.BytesIO()
    rows = [asdict(shard) for shard in shards]
    pq.write_table(pa.Table.from_pylist(rows, schema=_SHARD_SCHEMA), buffer, compression="zstd")
    store.put(_key(job.fingerprint, "shards"), buffer.getvalue())
    content = {"fingerprint": job.fingerprint, **asdict(job)}
    store.put_if_absent(JOB_KEY, yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode())
    return read_job(store)


def read_job(store: Store) -> Job:
    """The job planned in this output. Raises OutputError where there is none."""
    job = find_job(store)
    if job is None:
        raise OutputError(f"{store.uri} holds no job; name the output of 'sdbatch run'")
    return job


def find_job(store: Store) -> Job | None:
    """The job planned in this output, if any."""
    try:
        data = store.get(JOB_KEY)
    except ObjectNotFound:
        return None
    try:
        content = yaml.safe_load(data)
        del content["fingerprint"]
        return Job(**content)
    except (TypeError, KeyError, yaml.YAMLError) as error:
        raise OutputError(f"{store.uri}/{JOB_KEY} is damaged: {error}") from None


def read_shards(store: Store, job: Job) -> list[Shard]:
    rows = pq.read_table(io.BytesIO(store.get(_key(job.fingerprint, "shards")))).to_pylist()
    return [Shard(**row) for row in rows]


def refuse_changes(job: Job, deciding: dict[str, Any], model_sha256: str, input_changes: list[str], uri: str) -> None:
    """Raise PlanChanged, with the differences, unless the job is the one that the output was planned from."""
    told = [f"{field}: {_show(old)} → {_show(new)}" for field, old, new in _differences(job.deciding, deciding)]
    told += input_changes
    if model_sha256 != job.model_sha256:
        told.append(f"model: sha256 {job.model_sha256[:12]}… → {model_sha256[:12]}…")
    if told:
        raise PlanChanged(
            f"{uri} was planned from something else:\n  "
            + "\n  ".join(told)
            + "\nput back what changed to resume, or choose another output.uri"
        )


def _differences(old: Any, new: Any, field: str = "") -> list[tuple[str, Any, Any]]:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return [] if old == new else [(field, old, new)]
    found: list[tuple[str, Any, Any]] = []
    for key in sorted({*old, *new}):
        found += _differences(old.get(key), new.get(key), f"{field}.{key}".lstrip("."))
    return found


def _show(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value, ensure_ascii=False)
