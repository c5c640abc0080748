"""The proof of reproducibility: pictures made again, compared with the stored ones byte by byte."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray

from sdbatch.engine.cluster import await_room, ray_session
from sdbatch.engine.making.generator import Generator, looks_of
from sdbatch.engine.mending import prepared_again
from sdbatch.engine.planning.tasks import result_of
from sdbatch.ledger import Commits, Job, Shard, Shards, read_job, read_shards
from sdbatch.outputs import decode_metadata, pixels_sum, read_pictures
from sdbatch.storage import Store


@dataclass
class Recomputed:
    """How many images came out the same, and the ids of those that did not. ``by``: bytes or pixels."""

    same: int = 0
    different: list[str] = field(default_factory=list)
    by: str = "bytes"


def recompute(store: Store, count: int, here: Sequence[str], progress: Callable[[int, int], None]) -> Recomputed:
    """Make ``count`` committed images again, spread by chance over the job, always the same ones.

    Shards that were mended since are left out: not all of their pictures were made with one spec. ``here``: see
    :func:`prepared_again`.
    """
    job = read_job(store)
    prepared = prepared_again(store, job, (), here)
    signed = prepared.spec.output.c2pa is not None
    found, asked = Recomputed(by="pixels" if signed else "bytes"), 0
    with ray_session(prepared.spec.resources):
        await_room(prepared.spec.resources)
        resources = prepared.spec.resources
        remote: Any = ray.remote(num_cpus=resources.cpus_per_actor, num_gpus=resources.gpus_per_actor)(Generator)
        actor = remote.remote(prepared.located.model_dump(mode="json"), job)
        result_of(actor.load.remote(), "making again")
        for shard, positions, all_rows in _chosen(store, job, count):
            looks = looks_of(dict(enumerate(all_rows)))
            sums = result_of(actor.checksums.remote(shard, positions, looks), "making again")
            rows = {position: all_rows[position] for position in positions}
            stored = _pixels(store, rows) if signed else {position: row["sha256"] for position, row in rows.items()}
            for position, row in rows.items():
                if sums[position] == stored[position]:
                    found.same += 1
                else:
                    found.different.append(row["image_id"])
            asked += len(rows)
            progress(asked, count)
        ray.kill(actor)
    return found


def _pixels(store: Store, rows: Mapping[int, dict[str, Any]]) -> dict[int, str]:
    """sha256 of the pixels that are stored; nothing for a picture that is gone or none."""
    pictures = read_pictures(store, [row["path"] for row in rows.values()])
    found = dict.fromkeys(rows, "")
    for position, row in rows.items():
        with suppress(KeyError, OSError):
            found[position] = pixels_sum(pictures[row["path"]])
    return found


def _chosen(store: Store, job: Job, count: int) -> Iterator[tuple[Shard, list[int], list[dict[str, Any]]]]:
    """Shards in an order that the job's fingerprint decides, the places of some pictures of each, all its metadata."""
    shards, commits, chance = read_shards(store, job).makeable(), Commits(store), random.Random(job.fingerprint)
    a_shard = -(-count // max(len(shards), 1))
    for place in chance.sample(range(len(shards)), len(shards)):
        if count <= 0:
            return
        (shard,) = Shards(shards.table.slice(place, 1))
        record = commits.of_slice(shard.slice).get(shard.number)
        if record is None or record.edition > 1:
            continue
        rows = decode_metadata(store.get(record.metadata_key))
        made = [position for position, row in enumerate(rows) if row["status"] == "committed"]
        picked = sorted(chance.sample(made, min(a_shard, count, len(made))))
        count -= len(picked)
        yield shard, picked, rows
