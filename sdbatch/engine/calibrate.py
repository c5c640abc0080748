"""Calibration: a few batches made by actors of the job's own kind, to know their speed. Nothing is stored."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import ray

from sdbatch.engine.cluster import await_room, ray_session
from sdbatch.engine.costs.estimate import shapes_of, work
from sdbatch.engine.costs.speeds import Conditions, Measured, Speeds, keep_speeds
from sdbatch.engine.making.generator import Generator
from sdbatch.engine.planning.planner import Prepared
from sdbatch.engine.planning.tasks import result_of
from sdbatch.errors import JobFailed
from sdbatch.ledger import Job, Shard, Shards
from sdbatch.prompts import Shape
from sdbatch.spec import Resources

#: Shapes that are measured, those with the most work first, and batches of each beyond the one that warms up.
_SHAPES, _BATCHES = 3, 3
#: Actors that measure together, at most.
_MOST_ACTORS = 8


def calibrate(prepared: Prepared, job: Job, shards: Shards) -> Speeds:
    """Measure the speed of the shapes that most of the work in ``shards`` is of. Raises JobFailed where it can't be."""
    found: dict[Shape, Measured] = {}
    started, resources = time.perf_counter(), prepared.spec.resources
    with ray_session(resources):
        await_room(resources)
        options: dict[str, Any] = {
            "num_cpus": resources.cpus_per_actor,
            "num_gpus": resources.gpus_per_actor,
            "max_restarts": 0,
            "max_task_retries": 0,
        }
        remote: Any = ray.remote(**options)(Generator)
        crew = [remote.remote(prepared.located.model_dump(mode="json"), job) for _ in range(_crew(resources))]
        try:
            _all(actor.node.remote() for actor in crew)
            there = time.perf_counter()
            environment = _all(actor.load.remote() for actor in crew)[0]
            loaded = time.perf_counter()
            for shape, shard in _heaviest(shards):
                measured = Measured()
                for one in _all(actor.measure.remote(shard, _BATCHES) for actor in crew):
                    measured = measured.plus(one)
                if measured.images:
                    found[shape] = measured
        finally:
            for actor in crew:
                ray.kill(actor)
    if not found:
        raise JobFailed("calibrating failed: no picture could be made; 'sdbatch run' will tell of each request why")
    speeds = Speeds(
        device=environment["device"],
        starting_seconds=round(loaded - started, 3),
        loading_seconds=round(loaded - there, 3),
        source="a calibration",
        shapes=found,
    )
    keep_speeds(Conditions.of(prepared.spec, job.model_sha256), speeds)
    return speeds


def _crew(resources: Resources) -> int:
    """How many actors measure: one where each has its GPU; on the CPU those that would slow each other on a machine."""
    if resources.gpus_per_actor:
        return 1
    cpus: float = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])  # type: ignore[no-untyped-call]
    return max(min(resources.fewest, _MOST_ACTORS, int(cpus / resources.cpus_per_actor)), 1)


def _all(refs: Iterable[ray.ObjectRef[Any]]) -> list[Any]:
    return [result_of(ref, "calibrating") for ref in list(refs)]


def _heaviest(shards: Shards) -> list[tuple[Shape, Shard]]:
    """Of each shape its fullest shard, those shapes first that most of the work is of."""
    counts = shards.column("count")
    shapes = sorted(shapes_of(shards), key=lambda one: work(one[0]) * int(counts[one[1]].sum()), reverse=True)
    fullest = [(shape, int(places[counts[places].argmax()])) for shape, places in shapes[:_SHAPES]]
    return [(shape, next(iter(Shards(shards.table.slice(place, 1))))) for shape, place in fullest]
