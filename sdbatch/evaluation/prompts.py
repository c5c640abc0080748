"""The prompts of an evaluation: scenes of four kinds, each told in full, at every setting."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sdbatch.training.captions import caption
from sdbatch.training.world import Scene, Thing, random_scene

#: Cell → how many things its scenes hold, and whether they show what training never shows.
CELLS = {"one-seen": (1, False), "one-novel": (1, True), "two-seen": (2, False), "two-novel": (2, True)}

_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", pa.string()),
        ("seed", pa.int64()),
        ("sampler", pa.string()),
        ("num_inference_steps", pa.int32()),
        ("guidance_scale", pa.float64()),
        ("cell", pa.string()),
        ("number", pa.int32()),
        ("scene", pa.string()),
    ]
)
_SEEDS = 2**53  # every JSON reader keeps these exactly


@dataclass(frozen=True)
class Setting:
    """What is varied between the pictures of one prompt."""

    sampler: str
    num_inference_steps: int
    guidance_scale: float

    def __str__(self) -> str:
        return f"{self.sampler}, {self.num_inference_steps} steps, guidance {self.guidance_scale:g}"


def prompt_table(settings: Sequence[Setting], prompts_per_cell: int, seed: int) -> pa.Table:
    """One row a scene and setting, setting by setting.

    A scene has the same words and the same seed in every setting, so that settings are compared on the same noise.
    More prompts a cell add to the fewer ones and leave them as they are.
    """
    scenes = [row for cell in CELLS for row in _scenes(cell, prompts_per_cell, seed)]
    rows = [
        {"id": _id(row, setting), **asdict(setting), **row} for setting in dict.fromkeys(settings) for row in scenes
    ]
    return pa.Table.from_pylist(rows, schema=_SCHEMA)


def to_parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def scene_to_json(scene: Scene) -> str:
    return json.dumps(asdict(scene))


def scene_from_json(text: str) -> Scene:
    content: dict[str, Any] = json.loads(text)
    return Scene(**{**content, "things": tuple(Thing(**thing) for thing in content["things"])})


def _scenes(cell: str, count: int, seed: int) -> Iterator[dict[str, Any]]:
    things, novel = CELLS[cell]
    rng = np.random.default_rng([seed, things, novel])
    for number in range(count):
        scene = random_scene(rng, things=things, novel=novel)
        yield {
            "prompt": caption(scene, rng, complete=True),
            "seed": int(rng.integers(_SEEDS)),
            "cell": cell,
            "number": number,
            "scene": scene_to_json(scene),
        }


def _id(row: dict[str, Any], setting: Setting) -> str:
    varied = f"{setting.sampler}-{setting.num_inference_steps}-{setting.guidance_scale:g}"
    return f"{row['cell']}-{row['number']:05d}-{varied}"
