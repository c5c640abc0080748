"""Shards on their way from a job's output to an export: read and proved, encoded anew where asked, stored."""

from __future__ import annotations

import hashlib
import io
import time
import uuid
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from sdbatch.dataset.manifest import Manifest
from sdbatch.errors import StorageError, UsageError
from sdbatch.ledger import CommitRecord, Commits, Job, put_commit, shard_stem
from sdbatch.outputs import (
    FORMATS,
    Copies,
    EncodedPicture,
    Signer,
    StoredShard,
    as_stored,
    check_columns,
    decode_metadata,
    encode,
    metadata_key,
    metadata_of,
    read_pictures,
    remove_shard,
    store_copies,
)
from sdbatch.spec import JobSpec, Picture
from sdbatch.storage import Store
from sdbatch.storage.parquet import read_parquet

#: Shards that are read, encoded and stored at once.
_AT_ONCE = 4
_MENDED = "'sdbatch verify' tells what is wrong with the job's output, and 'sdbatch repair' mends it"
#: How files of each type begin.
_BEGINNINGS = {"png": b"\x89PNG", "jpeg": b"\xff\xd8\xff", "webp": b"RIFF"}


class Exporter:
    """Exports the shards of one job; ``copies`` are made of what is exported, ``signer`` signs what is made anew."""

    def __init__(
        self,
        source: Store,
        target: Store,
        job: Job,
        spec: JobSpec,
        manifest: Manifest,
        copies: list[Copies],
        signer: Signer | None,
    ) -> None:
        self._source, self._target, self._job = source, target, job
        self._fingerprint, self._image, self._condition = manifest.sha256, manifest.picture, manifest.condition
        self._copies, self._signer = copies, signer
        self._checked = check_columns(spec.checks)
        ending = (self._image or spec.output.image).type
        self._writer = FORMATS[manifest.format](target, ending, checked=self._checked)
        self._there = {record.shard: record for record in Commits(target).newest()}

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
        roots = [self._writer.root, *(several.root for several in self._copies)]
        for edition in range(1, record.edition):  # the job has mended it since; also where a stopped export left them
            remove_shard(self._target, shard_stem(record.shard, edition), roots)
        return made

    def _exported(self, record: CommitRecord, before: CommitRecord | None) -> CommitRecord:
        stem, fingerprint = shard_stem(record.shard, record.edition), self._job.part_of_slice(record.slice).fingerprint
        data = self._source.get(record.metadata_key)
        if hashlib.sha256(data).hexdigest() != record.metadata_sha256:
            raise StorageError(f"{self._source.uri}/{record.metadata_key} was altered; {_MENDED}")
        table = read_parquet(data)
        rows = {
            position: row
            for position, row in enumerate(table.to_pylist())
            if row["status"] == "committed" and (self._condition is None or self._condition(row))
        }
        pictures = self._pictures(rows, fingerprint)
        held = StoredShard([], {})
        if pictures:
            held = self._writer.finish(stem, self._writer.keep(stem, pictures, last=True))
        stored = {one.position: one for one in held.pictures}
        for position, row in rows.items():
            one = stored[position]
            rows[position] = row | {"path": one.path, "bytes": one.bytes, "sha256": one.sha256}
        standing = as_stored(self._target, pictures, held) if self._copies else []
        shown = [replace(one, row=rows[one.position]) for one in standing]
        copied = store_copies(self._copies, stem, shown, fingerprint, self._writer, self._signer)
        told, key = list(rows.values()), metadata_key(stem)
        made = pa.Table.from_pylist(told, schema=table.schema.remove_metadata())
        metadata = metadata_of(made, held.objects | copied.objects)
        if not self._target.put_if_absent(key, metadata):
            metadata = self._target.get(key)
            told = decode_metadata(metadata)
        return self._commit(record, before, key, metadata, told)

    def _pictures(self, rows: dict[int, dict[str, Any]], fingerprint: str) -> list[EncodedPicture]:
        read = read_pictures(self._source, [row["path"] for row in rows.values()])
        found = []
        for position, row in rows.items():
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
                made = encode(np.asarray(opened.convert("RGB")), image, row, fingerprint, self._checked)
        except (OSError, ValueError) as error:  # its prompt is too long for the file's header, say
            told = f"{row['image_id']} can't be encoded as {image.type}: {error}"
            raise UsageError(f"--image: {told}; choose another type, or leave it out by --where") from None
        return made if self._signer is None else self._signer.signed(made, image.type, row)

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
