"""One picture made again, as it was planned: in its shard, batch and slot, so that its bytes are the stored ones."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from sdbatch.engine.making.generator import Generator, looks_of
from sdbatch.engine.mending import prepared_again
from sdbatch.engine.models.latent_model import is_there
from sdbatch.errors import JobFailed, UsageError
from sdbatch.ledger import (
    DROPPED,
    Commits,
    Job,
    Rounds,
    Shard,
    Shards,
    read_job,
    read_shards,
    read_slice,
)
from sdbatch.outputs import decode_metadata, opens, pixels_sum, read_pictures
from sdbatch.storage import Store


@dataclass(frozen=True)
class Remade:
    """The bytes, and whether they are the stored ones; by the pixels where the job signs, for this one is not signed.

    ``differs``: what is otherwise here than it was then.
    """

    image_id: str
    data: bytes
    same: bool
    differs: tuple[str, ...]


def remake(store: Store, image: str, here: Sequence[str] = ()) -> Remade:
    """Make a committed picture again, in this process; ``image`` is its id, or SHARD/POSITION.

    ``here``: see :func:`prepared_again`.

    Raises UsageError when there is no such picture, or no such device as made it.
    """
    job = read_job(store)
    shard, position = _find(store, job, image)
    record = Commits(store).of_slice(shard.slice).get(shard.number)
    if record is None:
        raise UsageError(f"IMAGE: {image} has not been made yet; 'sdbatch run' makes it")
    rows = decode_metadata(store.get(record.metadata_key))
    row = rows[position]
    if row["status"] != "committed":
        remedy = "sdbatch retry … --set checks.…" if row["error"].startswith(DROPPED) else "sdbatch retry"
        raise UsageError(f"IMAGE: {image} is quarantined: {row['error']}; '{remedy}' tries it again")
    changed = Rounds(store).changed_for(record.shard, record.edition, position)
    prepared = prepared_again(store, job, changed, here)
    if not is_there(prepared.spec.resources.device):
        raise UsageError(f"IMAGE: {image} was made on a GPU, and there is none here; run this where there is one")
    generator = Generator(prepared.located.model_dump(mode="json"), job)
    environment = generator.load()
    shard = replace(shard, edition=record.edition)
    data = generator.made_again(shard, [position], looks_of(dict(enumerate(rows))))[position]
    if data is None:
        raise JobFailed(f"{image} could be made then and can't be made now")
    then = record.environment
    differs = tuple(
        f"{name}: {then.get(name)} then, {environment.get(name)} here"
        for name in sorted({*then, *environment})
        if then.get(name) != environment.get(name)
    )
    if prepared.spec.output.c2pa is None:
        same = hashlib.sha256(data).hexdigest() == row["sha256"]
    else:
        stored = read_pictures(store, [row["path"]]).get(row["path"])
        same = stored is not None and opens(stored) and pixels_sum(stored) == pixels_sum(data)
    return Remade(row["image_id"], data, same, differs)


def _find(store: Store, job: Job, image: str) -> tuple[Shard, int]:
    """Where an image is planned. No id looks like a place, for ids end in -0, -1, …"""
    shards, unknown = read_shards(store, job), UsageError(f"IMAGE: the job has no image {image}; name its image_id")
    if place := re.fullmatch(r"(\d{1,9})/(\d{1,9})", image):
        number, position = int(place[1]), int(place[2])
        for shard in shards.where(shards.column("number") == number):
            if position < shard.count:
                return shard, position
        raise unknown
    for row, of_slice in _rows(store, job, shards, image):
        for shard in of_slice:
            if shard.offset <= row < shard.offset + shard.count:
                return shard, row - shard.offset
    raise unknown


def _rows(store: Store, job: Job, shards: Shards, image: str) -> Iterator[tuple[int, Shards]]:
    for number in range(job.slices):
        ids = read_slice(store, job, number).column("image_id").to_pylist()
        if image in ids:
            yield ids.index(image), shards.of_slice(number)
