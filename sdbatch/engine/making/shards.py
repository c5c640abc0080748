"""Ending a shard: pictures first, metadata second, the commit record last, each written once.

What stands already is never overwritten but taken for what it is, so that of two writers both come to the
same end, and a shard whose writer died between two steps is finished without making it again. A new edition
of a shard is ended in the same way beside the one before, which goes only then.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from sdbatch.errors import ObjectNotFound, StorageError
from sdbatch.ledger import (
    Again,
    CommitRecord,
    Job,
    Rounds,
    Shard,
    count_reasons,
    find_commit,
    put_commit,
    read_collected,
    shard_stem,
)
from sdbatch.outputs import (
    FORMATS,
    EncodedPicture,
    Signer,
    StoredShard,
    as_stored,
    check_columns,
    checked_columns,
    copies,
    decode_metadata,
    encode_metadata,
    metadata_key,
    read_pictures,
    remove_shard,
    store_copies,
)
from sdbatch.prompts import ImageRequest
from sdbatch.spec import JobSpec
from sdbatch.storage import Store


def metadata_row(
    job: Job, shard: int, request: ImageRequest, *, truncated: bool = False, error: str | None = None
) -> dict[str, Any]:
    """An image's row of the metadata table; what only storing it can tell is still open."""
    return {
        "image_id": request.image_id,
        "row_id": request.row_id,
        "shard": shard,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": request.seed,
        "width": request.width,
        "height": request.height,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "sampler": request.sampler,
        "init_image": request.init_image,
        "mask_image": request.mask_image,
        "strength": request.strength,
        "truncated": truncated,
        "model": job.model_name,
        "model_sha256": job.model_sha256,
        "status": "committed" if error is None else "quarantined",
        "error": error,
        **({} if request.template is None else {"template": request.template}),
        **request.kept,
    }


@dataclass(frozen=True)
class Ended:
    """A request that is through: its metadata row, and its picture unless it was refused."""

    row: dict[str, Any]
    picture: EncodedPicture | None


class ShardCommitter:
    """Stores and commits the shards of one job."""

    def __init__(
        self, store: Store, spec: JobSpec, job: Job, environment: dict[str, str], signer: Signer | None = None
    ) -> None:
        self._store = store
        self._kept, self._templated = spec.kept, spec.prompt.templated
        self._job = job
        self._environment = environment
        self._rounds = Rounds(store)
        self._checked = check_columns(spec.checks)
        self.writer = FORMATS[spec.output.format](store, spec.output.image.type, checked=self._checked)
        self._copies, self._signer = copies(spec.output), signer

    def finish_started(self, shard: Shard) -> CommitRecord | None:
        """The shard's record if it is committed, or can be because its metadata is stored already."""
        record = find_commit(self._store, shard)
        if record is not None:
            return record
        try:
            metadata = self._store.get(metadata_key(shard.stem))
        except ObjectNotFound:
            return None
        return self._put_record(shard, metadata, {}, uuid.uuid4().hex)

    def carried_over(self, shard: Shard) -> dict[int, Ended]:
        """Position → what stays as the edition before has it. Nothing of a first edition.

        A picture whose stored bytes are not those recorded does not stay.
        """
        if shard.edition == 1:
            return {}
        again = self._again(shard)
        try:
            rows = decode_metadata(self._store.get(metadata_key(shard_stem(shard.number, again.before))))
        except (ObjectNotFound, pa.ArrowException, OSError, ValueError):  # gone, or damaged
            return {}
        stay = {position: row for position, row in enumerate(rows) if position not in again.positions}
        pictures = read_pictures(self._store, [row["path"] for row in stay.values() if row["path"]])
        found = {}
        for position, row in stay.items():
            data = pictures.get(row["path"])
            if row["status"] == "quarantined":
                found[position] = Ended(row, None)
            elif data is not None and hashlib.sha256(data).hexdigest() == row["sha256"]:
                found[position] = Ended(row, EncodedPicture(position, row, data))
        self.writer.carry_over(shard.stem, [end.picture for end in found.values() if end.picture is not None])
        return found

    def retried(self, shard: Shard) -> dict[int, int]:
        """Position → the edition that made a request again which had failed; the last one, up to this edition."""
        found = dict[int, int]()
        while shard.edition > 1:
            again = self._again(shard)
            if self._rounds[shard.edition].kind == "retry":
                found = dict.fromkeys(again.positions, shard.edition) | found
            shard = replace(shard, edition=again.before)
        return found

    def copies_of(self, shard: Shard, picture: EncodedPicture) -> list[EncodedPicture]:
        """The picture in each other form that is asked for; nothing is stored."""
        return [several.copy(picture, self._fingerprint(shard), self._signer) for several in self._copies]

    def commit(
        self, shard: Shard, ended: Sequence[Ended], seconds: dict[str, float], writer: str
    ) -> tuple[CommitRecord, Counter[int]]:
        """End the shard; ``ended`` has one entry a position, its pictures made and kept.

        With its record, by position, the bytes that copies of its pictures come to.
        """
        pictures = [end.picture for end in ended if end.picture is not None]
        finished = self.writer.finish(shard.stem, pictures) if pictures else StoredShard([], {})
        stored = {picture.position: picture for picture in finished.pictures}
        standing = as_stored(self._store, pictures, finished) if self._copies or self._checked else []
        ours = {picture.position: picture.data for picture in pictures}
        theirs = {one.position: one.data for one in standing if self._checked and one.data != ours.get(one.position)}
        rows = []
        for position, row in enumerate(end.row for end in ended):
            picture = stored.get(position)
            if picture is not None:  # also one that failed here, and that another writer's object holds
                if position in theirs:
                    row = row | (checked_columns(theirs[position], self._checked) or {})
                row = row | {"path": picture.path, "bytes": picture.bytes, "sha256": picture.sha256}
                row |= {"status": "committed", "error": None}
            elif row["status"] == "committed":
                row = row | {"status": "quarantined", "error": "another writer stored this shard without it"}
            rows.append(row)
        told = [replace(one, row=rows[one.position]) for one in standing]
        copied = store_copies(self._copies, shard.stem, told, self._fingerprint(shard), self.writer, self._signer)
        key, objects = metadata_key(shard.stem), finished.objects | copied.objects
        metadata = encode_metadata(rows, self._kept, templated=self._templated, checked=self._checked, objects=objects)
        if not self._store.put_if_absent(key, metadata):
            metadata = self._store.get(key)
        sizes = Counter[int]()
        for one in copied.pictures:
            sizes[one.position] += one.bytes
        return self._put_record(shard, metadata, seconds, writer), sizes

    def _fingerprint(self, shard: Shard) -> str:
        """The fingerprint that pictures tell."""
        return self._job.part_of_slice(shard.slice).fingerprint

    def _put_record(self, shard: Shard, metadata: bytes, seconds: dict[str, float], writer: str) -> CommitRecord:
        rows = decode_metadata(metadata)
        if len(rows) != shard.count:
            raise StorageError(f"{self._store.uri}/{metadata_key(shard.stem)} has {len(rows)} rows, not {shard.count}")
        failures = [
            {"image_id": row["image_id"], "error": row["error"]} for row in rows if row["status"] == "quarantined"
        ]
        before = self._before(shard) if shard.edition > 1 else None
        record = CommitRecord(
            shard=shard.number,
            slice=shard.slice,
            fingerprint=self._fingerprint(shard),
            writer=writer,
            committed=len(rows) - len(failures),
            quarantined=len(failures),
            bytes=sum(row["bytes"] or 0 for row in rows),
            metadata_key=metadata_key(shard.stem),
            metadata_sha256=hashlib.sha256(metadata).hexdigest(),
            failures=failures,
            seconds={name: round(value, 4) for name, value in seconds.items()},
            environment=self._environment,
            finished_at=round(time.time(), 3),
            edition=shard.edition,
            replaced={} if before is None else _sums(before),
            replaced_reasons={} if before is None else count_reasons(before.failures),
        )
        if not put_commit(self._store, record):
            standing = find_commit(self._store, shard)
            if standing is None or standing.metadata_sha256 != record.metadata_sha256:
                raise StorageError(f"shard {shard.number} has a commit record that does not match its metadata")
            record = standing
        self.writer.forget(shard.stem)
        if before is not None:
            roots = [self.writer.root, *(several.root for several in self._copies)]
            remove_shard(self._store, shard_stem(shard.number, before.edition), roots)
        return record

    def _again(self, shard: Shard) -> Again:
        return self._rounds[shard.edition].shards[shard.number]

    def _before(self, shard: Shard) -> CommitRecord:
        """The record of the edition that this one replaces."""
        edition = self._again(shard).before
        single = find_commit(self._store, replace(shard, edition=edition))
        if single is not None:
            return single
        records = read_collected(self._store, shard.slice, edition)
        return next(record for record in records if record.shard == shard.number)


def _sums(record: CommitRecord) -> dict[str, int]:
    """What the edition after this one takes its place of."""
    sums = {"committed": record.committed, "quarantined": record.quarantined, "bytes": record.bytes}
    return sums | ({"dropped": record.dropped} if record.dropped else {})
