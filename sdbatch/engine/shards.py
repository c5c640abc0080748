"""Ending a shard: pictures first, metadata second, the commit record last, each written once.

What stands already is never overwritten but taken for what it is, so that of two writers both come to the
same end, and a shard whose writer died between two steps is finished without making it again.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Sequence
from typing import Any

from sdbatch.errors import ObjectNotFound, StorageError
from sdbatch.ledger import CommitRecord, Job, Shard, find_commit, put_commit
from sdbatch.outputs import (
    FORMATS,
    EncodedPicture,
    decode_metadata,
    encode_metadata,
    metadata_key,
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
        **request.kept,
    }


class ShardCommitter:
    """Stores and commits the shards of one job."""

    def __init__(self, store: Store, spec: JobSpec, job: Job, environment: dict[str, str]) -> None:
        self._store = store
        self._kept = list(spec.input.kept)
        self._fingerprint = job.fingerprint
        self._environment = environment
        self.writer = FORMATS[spec.output.format](store, spec.output.image.type)

    def finish_started(self, shard: Shard) -> CommitRecord | None:
        """The shard's record if it is committed, or can be because its metadata is stored already."""
        record = find_commit(self._store, shard.number)
        if record is not None:
            return record
        try:
            metadata = self._store.get(metadata_key(shard.stem))
        except ObjectNotFound:
            return None
        record = self._put_record(shard, metadata, {}, uuid.uuid4().hex)
        self.writer.forget(shard.stem)
        return record

    def commit(
        self,
        shard: Shard,
        rows: Sequence[dict[str, Any]],
        pictures: Sequence[EncodedPicture],
        seconds: dict[str, float],
        writer: str,
    ) -> CommitRecord:
        """End the shard; ``rows`` has one entry a position, ``pictures`` those that were made and kept."""
        finished = self.writer.finish(shard.stem, pictures) if pictures else []
        stored = {picture.position: picture for picture in finished}
        final = []
        for position, row in enumerate(rows):
            picture = stored.get(position)
            if picture is not None and row["status"] == "committed":
                row = row | {"path": picture.path, "bytes": picture.bytes, "sha256": picture.sha256}
            elif row["status"] == "committed":
                row = row | {"status": "quarantined", "error": "another writer stored this shard without it"}
            final.append(row)
        key = metadata_key(shard.stem)
        metadata = encode_metadata(final, self._kept)
        if not self._store.put_if_absent(key, metadata):
            metadata = self._store.get(key)
        record = self._put_record(shard, metadata, seconds, writer)
        self.writer.forget(shard.stem)
        return record

    def _put_record(self, shard: Shard, metadata: bytes, seconds: dict[str, float], writer: str) -> CommitRecord:
        rows = decode_metadata(metadata)
        if len(rows) != shard.count:
            raise StorageError(
                f"{self._store.uri}/{metadata_key(shard.stem)} has {len(rows)} rows, not {shard.count}"
            )
        failures = [
            {"image_id": row["image_id"], "error": row["error"]} for row in rows if row["status"] == "quarantined"
        ]
        record = CommitRecord(
            shard=shard.number,
            fingerprint=self._fingerprint,
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
        )
        if put_commit(self._store, record):
            return record
        standing = find_commit(self._store, shard.number)
        if standing is None or standing.metadata_sha256 != record.metadata_sha256:
            raise StorageError(f"shard {shard.number} has a commit record that does not match its metadata")
        return standing
