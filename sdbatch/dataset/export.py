"""A job's pictures in another form, without making any: read shard by shard, stored anew elsewhere.

    TARGET/_sdbatch/export.json         what is exported, and how; written first: another export goes elsewhere
    TARGET/_sdbatch/commits/…           a record a shard, written last, as a job writes them

The same command goes on where it was stopped, and takes what the job has made or mended since.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from sdbatch.dataset.card import Card, code, write_card
from sdbatch.dataset.job_card import settings
from sdbatch.dataset.where import Where
from sdbatch.errors import ObjectNotFound, OutputError, StorageError, UsageError
from sdbatch.ledger import (
    CommitRecord,
    Commits,
    Job,
    find_job,
    put_commit,
    read_job,
    read_shards,
    read_status,
    read_totals,
    shard_stem,
)
from sdbatch.outputs import (
    FORMATS,
    EncodedPicture,
    StoredShard,
    check_columns,
    decode_metadata,
    encode,
    metadata_key,
    metadata_of,
    read_pictures,
)
from sdbatch.spec import Checks, Picture, parse_spec
from sdbatch.storage import Store
from sdbatch.storage.parquet import read_parquet

EXPORT_KEY = "_sdbatch/export.json"
#: Shards that are read, encoded and stored at once.
_AT_ONCE = 4
_MENDED = "'sdbatch verify' tells what is wrong with the job's output, and 'sdbatch repair' mends it"
#: How files of each type begin.
_BEGINNINGS = {"png": b"\x89PNG", "jpeg": b"\xff\xd8\xff", "webp": b"RIFF"}
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Manifest:
    """What a target holds: which job's pictures, which of them, in which form."""

    name: str
    fingerprint: str  # of the job's first part: extensions are exported, too
    format: str
    image: dict[str, Any] | None  # how pictures were encoded anew; None: they have the job's own bytes
    where: str | None

    @property
    def sha256(self) -> str:
        """Commit records of this export carry it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Exported:
    """How an export ended. ``unmade``: pictures that the job has still to make."""

    target: str
    images: int
    bytes: int
    left_out: int
    unmade: int


def export(
    source: Store,
    target: Store,
    form: str | None,
    image: Picture | None,
    where: str | None,
    progress: Progress,
) -> Exported:
    """Store the committed pictures of a job in ``target``; a ``form`` or ``image`` of None is the job's own.

    Raises OutputError where the target holds something else, UsageError for a condition that says nothing.
    """
    job, condition = read_job(source), None if where is None else Where(where)
    spec = parse_spec(job.spec, "the output's job.yaml")
    wanted = None if image is None else image.model_dump(mode="json")
    manifest = Manifest(spec.name, job.parts[0].fingerprint, form or spec.output.format, wanted, where)
    records = Commits(source)
    first = next(records.newest(), None)
    if first is None:
        raise UsageError(f"{source.uri}: nothing of this job is made yet; 'sdbatch run' makes it")
    schema = pq.read_schema(io.BytesIO(source.get(first.metadata_key)))
    for column in sorted(condition.columns if condition else ()):
        if column not in schema.names:
            raise UsageError(f"--where: there is no column {column!r}; there is: {', '.join(schema.names)}")
    _begin(source, target, manifest)
    exporter = _Exporter(source, target, job, manifest, image, spec.output.image, spec.checks, condition)
    status = read_status(source)
    for done, _ in enumerate(exporter.all(records), 1):
        progress(done, status.shards_committed)
    totals = read_totals(target)
    ended = Exported(target.uri, totals.committed, totals.bytes, status.committed - totals.committed, status.remaining)
    _write_card(source, target, job, manifest, (image or spec.output.image).type, schema, ended)
    return ended


def read_manifest(store: Store) -> Manifest | None:
    """What is exported to here, if anything."""
    try:
        return Manifest(**json.loads(store.get(EXPORT_KEY)))
    except ObjectNotFound:
        return None
    except (ValueError, TypeError) as error:
        raise OutputError(f"{store.uri}/{EXPORT_KEY} is damaged: {error}; export to an empty place") from None


def _begin(source: Store, target: Store, manifest: Manifest) -> None:
    """Take the target for this export. Raises OutputError where it is not free."""
    standing = read_manifest(target)
    if standing is None:
        if find_job(target) is not None:
            raise OutputError(f"TARGET: {target.uri} is a job's output; export to an empty place")
        foreign = next(iter(target.list("data/")), None)
        if foreign is not None:
            raise OutputError(f"TARGET: {target.uri} holds {foreign.key} but no export; export to an empty place")
        target.put_if_absent(EXPORT_KEY, json.dumps(asdict(manifest), ensure_ascii=False, indent=2).encode())
        standing = read_manifest(target)
    if standing != manifest and standing is not None:
        there, here = asdict(standing), asdict(manifest)
        told = "; ".join(
            f"{name}: {there[name]} there, {here[name]} here" for name in there if there[name] != here[name]
        )
        raise OutputError(f"TARGET: {target.uri} holds another export ({told}); export to an empty place")


class _Exporter:
    """Shards on their way from one store to the other."""

    def __init__(
        self,
        source: Store,
        target: Store,
        job: Job,
        manifest: Manifest,
        image: Picture | None,
        stored_as: Picture,
        checks: Checks | None,
        condition: Where | None,
    ) -> None:
        self._source, self._target, self._job = source, target, job
        self._fingerprint, self._image, self._condition = manifest.sha256, image, condition
        self._checked = check_columns(checks)
        self._writer = FORMATS[manifest.format](target, (image or stored_as).type, checked=self._checked)
        there = Commits(target)
        self._there = {record.shard: record for record in there.newest()}

    def all(self, records: Commits) -> Iterator[CommitRecord]:
        """Every shard that the job has, in their order, some of them at once."""
        waiting = deque[Future[CommitRecord]]()
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for record in records.newest():
                waiting.append(pool.submit(self._one, record))
                if len(waiting) > _AT_ONCE:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _one(self, record: CommitRecord) -> CommitRecord:
        before = self._there.get(record.shard)
        made = before if before is not None and before.edition == record.edition else self._exported(record, before)
        for edition in range(1, record.edition):  # the job has mended it since; also where a stopped export left them
            self._remove(shard_stem(record.shard, edition))
        return made

    def _exported(self, record: CommitRecord, before: CommitRecord | None) -> CommitRecord:
        stem = shard_stem(record.shard, record.edition)
        data = self._source.get(record.metadata_key)
        if hashlib.sha256(data).hexdigest() != record.metadata_sha256:
            raise StorageError(f"{self._source.uri}/{record.metadata_key} was altered; {_MENDED}")
        table = read_parquet(data)
        rows = [
            (position, row)
            for position, row in enumerate(table.to_pylist())
            if row["status"] == "committed" and (self._condition is None or self._condition(row))
        ]
        pictures = self._pictures(rows, record)
        held = StoredShard([], {})
        if pictures:
            held = self._writer.finish(stem, self._writer.keep(stem, pictures, last=True))
        stored = {one.position: one for one in held.pictures}
        told = [
            row | {"path": stored[position].path, "bytes": stored[position].bytes, "sha256": stored[position].sha256}
            for position, row in rows
        ]
        metadata = metadata_of(pa.Table.from_pylist(told, schema=table.schema.remove_metadata()), held.objects)
        key = metadata_key(stem)
        if not self._target.put_if_absent(key, metadata):
            metadata = self._target.get(key)
            told = decode_metadata(metadata)
        return self._commit(record, before, key, metadata, told)

    def _pictures(self, rows: list[tuple[int, dict[str, Any]]], record: CommitRecord) -> list[EncodedPicture]:
        read = read_pictures(self._source, [row["path"] for _, row in rows])
        fingerprint = self._job.part_of_slice(record.slice).fingerprint
        found = []
        for position, row in rows:
            data = read.get(row["path"])
            if data is None or hashlib.sha256(data).hexdigest() != row["sha256"]:
                told = "is gone" if data is None else "was altered"
                raise StorageError(f"{self._source.uri}/{row['path']} {told}; {_MENDED}")
            if self._image is None:
                if not data.startswith(_BEGINNINGS[self._writer.ending]):
                    told = f"is no {self._writer.ending}, as others of this job are"
                    raise UsageError(f"{self._source.uri}/{row['path']} {told}; say by --image what all shall be")
            else:
                data = self._encoded(data, self._image, row, fingerprint)
            found.append(EncodedPicture(position, row, data))
        return found

    def _encoded(self, data: bytes, image: Picture, row: dict[str, Any], fingerprint: str) -> bytes:
        """A picture encoded anew. Raises UsageError where it does not fit into that type."""
        try:
            with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as opened:
                return encode(np.asarray(opened.convert("RGB")), image, row, fingerprint, self._checked)
        except (OSError, ValueError) as error:  # its prompt is too long for the file's header, say
            told = f"{row['image_id']} can't be encoded as {image.type}: {error}"
            raise UsageError(f"--image: {told}; choose another type, or leave it out by --where") from None

    def _commit(
        self,
        record: CommitRecord,
        before: CommitRecord | None,
        key: str,
        metadata: bytes,
        rows: list[dict[str, Any]],
    ) -> CommitRecord:
        made = replace(
            record,
            fingerprint=self._fingerprint,
            writer=uuid.uuid4().hex,
            committed=len(rows),
            quarantined=0,
            bytes=sum(row["bytes"] for row in rows),
            metadata_key=key,
            metadata_sha256=hashlib.sha256(metadata).hexdigest(),
            failures=[],
            seconds={},
            finished_at=round(time.time(), 3),
            replaced={} if before is None else {"committed": before.committed, "quarantined": 0, "bytes": before.bytes},
            replaced_reasons={},
        )
        put_commit(self._target, made)
        return made

    def _remove(self, stem: str) -> None:
        for entry in list(self._target.list(f"data/{stem}")):
            if entry.key[len(f"data/{stem}")] in "./":
                self._target.delete(entry.key)
        self._target.delete(metadata_key(stem))


def _write_card(
    source: Store, target: Store, job: Job, manifest: Manifest, ending: str, schema: pa.Schema, ended: Exported
) -> None:
    spec = parse_spec(job.spec, "the output's job.yaml")
    facts = {"exported from": code(source.uri), "fingerprint": code(job.fingerprint)}
    if manifest.where is not None:
        facts["chosen by"] = code(manifest.where)
    write_card(
        target,
        Card(
            name=spec.name,
            license=spec.output.license,
            format=manifest.format,
            ending=ending,
            images=ended.images,
            bytes=ended.bytes,
            model=job.model_name,
            model_sha256=job.model_sha256,
            columns=schema,
            kept=tuple(spec.kept),
            facts={**settings(read_shards(source, job).makeable()), **facts},
            counts={"pictures of the job that are left out": ended.left_out},
        ),
    )
