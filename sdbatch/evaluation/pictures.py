"""Reading the pictures of a finished job back into scenes, shard by shard, on Ray."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import ray
from PIL import Image

from sdbatch.engine.planning.tasks import result_of
from sdbatch.errors import JobFailed
from sdbatch.evaluation.fidelity import Reading
from sdbatch.evaluation.prompts import Setting, scene_from_json
from sdbatch.ledger import Commits
from sdbatch.outputs import decode_metadata, read_pictures
from sdbatch.storage import Store, open_store
from sdbatch.training import checker
from sdbatch.training.world import Array

#: The size at which pictures are read, in pixels; larger ones are made smaller.
_PIXELS = 64


def read_back(store: Store, progress: Callable[[int, int], None]) -> list[Reading]:
    """Every committed picture of the job in ``store``, in the order of its plan; ``progress`` hears shards done."""
    task = ray.remote(num_cpus=1, max_retries=3)(_read_shard)
    found = [task.remote(store.uri, record.metadata_key) for record in Commits(store).newest()]
    left = list(found)
    while left:
        done, left = ray.wait(left, num_returns=1)
        result_of(done[0], "reading pictures back")
        progress(len(found) - len(left), len(found))
    return [reading for ref in found for reading in result_of(ref, "reading pictures back")]


def _read_shard(uri: str, metadata_key: str) -> list[Reading]:
    """The pictures of one shard. Runs in Ray's workers."""
    store = open_store(uri)
    rows = [row for row in decode_metadata(store.get(metadata_key)) if row["status"] == "committed"]
    pictures = read_pictures(store, [row["path"] for row in rows])
    lost = [row["image_id"] for row in rows if not pictures.get(row["path"])]
    if lost:
        raise JobFailed(f"{len(lost)} pictures are gone, {lost[0]} is one; see 'sdbatch verify {uri}'")
    return [_reading(row, pictures[row["path"]]) for row in rows]


def _reading(row: dict[str, Any], data: bytes) -> Reading:
    return Reading(
        cell=row["cell"],
        number=int(row["number"]),
        setting=Setting(row["sampler"], row["num_inference_steps"], row["guidance_scale"]),
        prompt=row["prompt"],
        path=row["path"],
        told=scene_from_json(row["scene"]),
        seen=checker.read(_pixels(data)),
    )


def _pixels(data: bytes) -> Array:
    """The picture at the size it is read at, (64, 64, 3) uint8."""
    with Image.open(io.BytesIO(data)) as picture:
        colours = picture.convert("RGB")
    if colours.size != (_PIXELS, _PIXELS):
        colours = colours.resize((_PIXELS, _PIXELS), Image.Resampling.BOX)
    return np.asarray(colours)
