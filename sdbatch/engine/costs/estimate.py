"""What a job will take: pure functions on the plan's shards and on measured speeds. Nothing is guessed unmeasured."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from sdbatch.engine.costs.speeds import Measured, Speeds
from sdbatch.engine.handing import HELD, takes_another
from sdbatch.ledger import Shards
from sdbatch.prompts import Shape
from sdbatch.spec import Resources

#: The columns of the plan's index that make a shard's shape.
_SHAPE = ("width", "height", "num_inference_steps", "sampler", "guided", "chunks", "strength", "masked")
#: Samplers that ask the network twice a step.
_TWICE = ("heun", "dpmpp_sde")


@dataclass(frozen=True)
class Estimate:
    """What the shards will take. ``usd`` is None where there is no price, ``bytes`` where no picture was measured."""

    images: int
    shards: int
    batches: int
    actors: int
    starting_seconds: float
    wall_seconds: float  # with the start, and the end at which some actors have nothing left to do
    actor_hours: float
    gpu_hours: float
    usd: float | None
    bytes: int | None
    seconds_a_batch: float  # on average
    scaled: float  # the fraction of that time which follows from another shape's speed
    device: str
    source: str


@dataclass(frozen=True)
class Purse:
    """Actor-seconds that may still be spent, and what a batch is known to take before the first one is made."""

    seconds: float = math.inf
    a_batch: float = 0.0

    def is_spent(self, taken: float, at_work: int, a_batch: float, look: float) -> bool:
        """Is it time to stop, so that each actor at work can still end its batch?

        ``a_batch``: the longest that one took so far, until it was stored. ``look``: seconds until this is asked again.
        """
        return taken + at_work * (max(a_batch, self.a_batch) + look) >= self.seconds


def shapes_of(shards: Shards) -> list[tuple[Shape, np.ndarray]]:
    """Each shape with the places of its shards, in the order in which shapes first occur."""
    table = shards.table.select(_SHAPE).append_column("place", pa.array(np.arange(len(shards))))
    found = table.group_by(list(_SHAPE), use_threads=False).aggregate([("place", "list")]).to_pylist()
    return [(Shape(**{name: row[name] for name in _SHAPE}), np.array(row["place_list"])) for row in found]


def work(shape: Shape) -> float:
    """What a picture costs in proportion: pixels × times that the network sees it. Scales to shapes not measured."""
    steps = shape.num_inference_steps * (1.0 if shape.strength is None else shape.strength)
    twice = 2 if shape.sampler.startswith(_TWICE) else 1
    return shape.width * shape.height * max(steps, 1.0) * twice * (2 if shape.guided else 1)


def speed_of(shape: Shape, speeds: Speeds) -> tuple[Measured, bool]:
    """What batches of a shape take, and whether that was measured; if not it is scaled from the nearest shape."""
    if shape in speeds.shapes:
        return speeds.shapes[shape], True
    near = min(speeds.shapes, key=lambda other: abs(math.log(work(shape) / work(other))))
    found, factor = speeds.shapes[near], work(shape) / work(near)
    pixels = shape.width * shape.height / (near.width * near.height)
    scaled = Measured(
        found.batches,
        found.seconds * factor,
        found.firsts,
        found.first_seconds * factor,
        found.images,
        int(found.bytes * pixels),
    )
    return scaled, False


def estimate(shards: Shards, batch_size: int, resources: Resources, speeds: Speeds, actors: int) -> Estimate:
    """What these shards will take on so many actors."""
    counts = shards.column("count")
    batches = -(-counts // batch_size)
    seconds, warm_ups, kinds = np.zeros(len(shards)), list[float](), np.zeros(len(shards), np.int64)
    size, sized, scaled = 0.0, True, 0.0
    for kind, (shape, places) in enumerate(shapes_of(shards)):
        found, measured = speed_of(shape, speeds)
        seconds[places], kinds[places] = batches[places] * found.a_batch, kind
        warm_ups.append(found.warm_up)
        scaled += 0.0 if measured else float(seconds[places].sum())
        sized = sized and found.images > 0
        size += float(counts[places].sum()) * found.bytes / max(found.images, 1)
    ends = through(seconds.tolist(), kinds.tolist(), warm_ups, actors)
    hours = sum(speeds.loading_seconds + end for end in ends) / 3600
    price, total = resources.usd_per_actor_hour, float(seconds.sum())
    return Estimate(
        images=shards.images,
        shards=len(shards),
        batches=int(batches.sum()),
        actors=len(ends),
        starting_seconds=round(speeds.starting_seconds if ends else 0.0, 3),
        wall_seconds=round(speeds.starting_seconds + max(ends) if ends else 0.0, 3),
        actor_hours=round(hours, 6),
        gpu_hours=round(hours * resources.gpus_per_actor, 6),
        usd=None if price is None else round(hours * price, 6),
        bytes=int(size) if sized else None,
        seconds_a_batch=round(total / max(int(batches.sum()), 1), 4),
        scaled=round(scaled / total, 4) if total else 0.0,
        device=speeds.device,
        source=speeds.source,
    )


def through(seconds: Sequence[float], kinds: Sequence[int], warm_ups: Sequence[float], actors: int) -> list[float]:
    """When each of the actors is through, if all begin at 0: shards are handed out as the pool does, and never divided.

    An actor has a shard in work, and others wait beside it. Its first batch of each shape's kind takes a warm-up more.
    """
    actors = min(actors, len(seconds))
    waiting = [deque[int]() for _ in range(actors)]
    warm = [set[int]() for _ in range(actors)]
    todo = deque(range(len(seconds)))
    ends, running = [0.0] * actors, list[tuple[float, int]]()

    def begin(actor: int, now: float) -> None:
        shard = waiting[actor].popleft()
        extra = 0.0 if kinds[shard] in warm[actor] else warm_ups[kinds[shard]]
        warm[actor].add(kinds[shard])
        heapq.heappush(running, (now + seconds[shard] + extra, actor))

    def hand(actor: int, held: int) -> None:
        if len(waiting[actor]) <= held and takes_another(held, len(todo), actors):
            waiting[actor].append(todo.popleft())

    for held in range(HELD):
        for actor in range(actors):
            hand(actor, held)
    for actor in range(actors):
        begin(actor, 0.0)
    while running:
        now, actor = heapq.heappop(running)
        ends[actor] = now
        for held in range(HELD):
            hand(actor, held)
        if waiting[actor]:
            begin(actor, now)
    return ends
