"""How fast batches were made: measured by every run and every calibration, kept for the estimates of later ones.

    $XDG_CACHE_HOME/sdbatch/speeds.json   the record of this user's runs; without the variable in ~/.cache

It is a shortcut like any cache: it may be removed, is never part of a plan, and what can't be read of it counts as not
there. What an output's own runs took is in its ledger too (``ledger.runs``), and goes first.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sdbatch.ledger import Run, Shard
from sdbatch.prompts import Shape
from sdbatch.spec import JobSpec, Output

#: Batches after which older ones lose weight, and how much the record holds.
_WEIGHT = 256
_MOST_CONDITIONS, _MOST_SHAPES = 100, 100
#: The fields of an output that ask for every picture once more.
_COPIES = {"renditions", "thumbnail"}


@dataclass(frozen=True)
class Measured:
    """What batches of one shape took. A process's first batch of a shape counts by itself: it may have to warm up."""

    batches: int = 0
    seconds: float = 0.0
    firsts: int = 0
    first_seconds: float = 0.0
    images: int = 0  # that were encoded, and what they came to
    bytes: int = 0

    def plus(self, other: Measured) -> Measured:
        return Measured(*(mine + theirs for mine, theirs in zip(_numbers(self), _numbers(other), strict=True)))

    def after(self, older: Measured) -> Measured:
        """This on top of what was measured earlier, which counts for less the more there is of it."""
        weight = min(1.0, _WEIGHT / max(older.batches + older.firsts, 1))
        faded = Measured(
            batches=int(older.batches * weight),
            seconds=older.seconds * int(older.batches * weight) / max(older.batches, 1),
            firsts=int(older.firsts * weight),
            first_seconds=older.first_seconds * int(older.firsts * weight) / max(older.firsts, 1),
            images=int(older.images * weight),
            bytes=int(older.bytes * int(older.images * weight) / max(older.images, 1)),
        )
        return self.plus(faded)

    @property
    def a_batch(self) -> float:
        """Seconds; first batches count only where there are no others."""
        return self.seconds / self.batches if self.batches else self.first_seconds / max(self.firsts, 1)

    @property
    def warm_up(self) -> float:
        """Seconds that a process's first batch takes more than others."""
        return max(self.first_seconds / self.firsts - self.a_batch, 0.0) if self.firsts else 0.0


@dataclass(frozen=True)
class Conditions:
    """What a batch's time depends on, beside its shape and the device."""

    model_sha256: str
    dtype: str
    batch_size: int
    kind: str  # cpu or cuda
    threads: int
    picture: str  # the file format, and whether it is signed: the bytes of an image depend on it
    checks: str = ""  # a digest of them: candidates, new seeds, what is measured
    copies: str = ""  # a digest of them: renditions and thumbnails

    @classmethod
    def of(cls, spec: JobSpec, model_sha256: str) -> Conditions:
        resources, output = spec.resources, spec.output
        return cls(
            model_sha256,
            spec.model.computing,
            resources.at_once,
            resources.device,
            resources.cpus_per_actor,
            _told(output),
            "" if spec.checks is None else _digest(spec.checks.model_dump(mode="json")),
            _digest(output.model_dump(mode="json", include=_COPIES)) if output.copied_to else "",
        )

    def content(self) -> dict[str, Any]:
        """As JSON holds it; without checks and copies as it was before there were any."""
        return {name: value for name, value in asdict(self).items() if name not in {"checks", "copies"} or value}


@dataclass(frozen=True)
class Speeds:
    """Everything that is known under some conditions on one device. ``source``: who measured it, in words."""

    device: str
    starting_seconds: float  # from the command to the first model loaded, without planning
    loading_seconds: float  # an actor's, from its process to its model loaded
    at: float = 0.0  # seconds since 1970
    source: str = "earlier runs"
    shapes: Mapping[Shape, Measured] = field(default_factory=dict)

    def after(self, older: Speeds | None) -> Speeds:
        """These on top of older ones."""
        known = {} if older is None else older.shapes
        merged = {shape: found.after(known.get(shape, Measured())) for shape, found in self.shapes.items()}
        return replace(self, shapes={**merged, **{shape: old for shape, old in known.items() if shape not in merged}})

    def content(self) -> dict[str, Any]:
        """As JSON holds it."""
        shapes = [{"shape": asdict(shape), "measured": asdict(found)} for shape, found in self.shapes.items()]
        return {**asdict(replace(self, shapes={})), "shapes": shapes[:_MOST_SHAPES]}

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Speeds:
        """Back from JSON. Raises ValueError, TypeError, KeyError or AttributeError."""
        shapes = {Shape(**one["shape"]): Measured(**one["measured"]) for one in content["shapes"]}
        return cls(**{**content, "shapes": shapes})


_DAMAGE = (ValueError, TypeError, KeyError, AttributeError)


def shape_of(shard: Shard) -> Shape:
    """What all of a shard's requests have in common."""
    return Shape(
        shard.width,
        shard.height,
        shard.num_inference_steps,
        shard.sampler,
        shard.guided,
        shard.chunks,
        shard.strength,
        shard.masked,
    )


def find_speeds(conditions: Conditions, runs: Iterable[Run] = ()) -> Speeds | None:
    """What is known under these conditions: of the output's own ``runs``, then of other jobs, the newest device's."""
    known = [Speeds.read(one["speeds"]) for one in _record() if one["conditions"] == conditions.content()]
    own = None
    for run in runs:
        if run.conditions == conditions.content() and run.speeds:
            own = replace(Speeds.read(run.speeds), source="this output's runs").after(own)
    if own is None:
        return max(known, key=lambda speeds: speeds.at, default=None)
    others = next((speeds for speeds in known if speeds.device == own.device), None)
    return own if others is None else replace(own, shapes={**others.shapes, **own.shapes})


def keep_speeds(conditions: Conditions, speeds: Speeds) -> None:
    """Bring the record up to date. Nothing happens where it can't be written."""
    speeds = replace(speeds, at=round(time.time(), 1))
    here = {"conditions": conditions.content(), "device": speeds.device}
    rest = []
    for one in _record():
        older = Speeds.read(one["speeds"])
        if {"conditions": one["conditions"], "device": older.device} == here:
            speeds = speeds.after(older)
        else:
            rest.append(one)
    content = [{"conditions": conditions.content(), "speeds": speeds.content()}, *rest[: _MOST_CONDITIONS - 1]]
    path = _path()
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(content), encoding="utf-8")
        partial.replace(path)
    except OSError:
        return


def _record() -> list[dict[str, Any]]:
    """What can be read of the record, the newest first."""
    try:
        found = json.loads(_path().read_text(encoding="utf-8"))
        for one in found:
            Conditions(**one["conditions"]), Speeds.read(one["speeds"])
    except (OSError, *_DAMAGE):
        return []
    return found


def _path() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdbatch/speeds.json"


def _numbers(measured: Measured) -> tuple[Any, ...]:
    return (
        measured.batches,
        measured.seconds,
        measured.firsts,
        measured.first_seconds,
        measured.images,
        measured.bytes,
    )


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _told(output: Output) -> str:
    picture = output.image
    how = "" if picture.type == "png" else " lossless" if picture.lossless else f" {picture.quality}"
    return f"{picture.type}{how}{' signed' if output.c2pa else ''}"
