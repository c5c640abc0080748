"""A job planned without Ray, for benchmarks that look at one actor by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdbatch.engine.making.generator import Generator
from sdbatch.engine.models.loading import find_model
from sdbatch.engine.planning.slices import shards_of
from sdbatch.ledger import Job, Part, Shard, Shards, write_job, write_slice
from sdbatch.prompts import RowIds, cut, requests_of_slice, to_table
from sdbatch.spec import JobSpec, parse_spec
from sdbatch.storage import LocalStore


def plan(root: Path, images: int, shard: int, **sections: Any) -> tuple[JobSpec, Job, list[Shard]]:
    """A job of so many pictures in shards of so many, in the folder ``root``."""
    output = {"uri": str(root), "shard_size": shard, **sections.pop("output", {})}
    spec = parse_spec({"name": "bench", "input": {"uri": "x.csv"}, "output": output, **sections})
    model = find_model(spec.model)
    rows: list[dict[str, str | None]] = [{"prompt": f"a red circle above a blue ring {i}"} for i in range(images)]
    requests = list(requests_of_slice(rows, 0, spec, model.facts, RowIds(False)))
    shards = list(shards_of(cut(requests, shard)))
    part = Part("f" * 64, rows=images, slices=1, shards=len(shards), planned=images, faulty=0)
    job = Job(spec.model_dump(mode="json"), spec.deciding(), [], model.sha256, {}, (part,))
    store = LocalStore(root)
    write_slice(store, job.fingerprint, 0, to_table(requests, []))
    return spec, write_job(store, job, Shards.of(shards)), shards


def generator(spec: JobSpec, job: Job) -> Generator:
    """An actor's inside, with its model loaded."""
    made = Generator(spec.model_dump(mode="json"), job)
    made.load()
    return made
