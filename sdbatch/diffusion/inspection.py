"""What a checkpoint is, and what it lacks, without loading it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from sdbatch.diffusion.checkpoint import Checkpoint, Component
from sdbatch.diffusion.locate import open_checkpoint
from sdbatch.diffusion.memory import peak_bytes
from sdbatch.errors import ModelError


@dataclass(frozen=True)
class NetworkFacts:
    """One network: its size, and the number formats that it is stored in."""

    name: str
    parameters: int
    stored_as: list[str]
    bytes: int


@dataclass(frozen=True)
class Inspection:
    """``problems`` is empty for a checkpoint that loads; the rest is as far as it can be told."""

    uri: str
    problems: list[str]
    path: str | None = None
    family: str | None = None
    layout: str | None = None
    prediction_type: str | None = None
    zero_terminal_snr: bool | None = None
    width: int | None = None
    height: int | None = None
    half_precision_peak: int | None = None  # bytes, one picture of that size in float16
    tokenizers: list[str] = field(default_factory=list)
    networks: list[NetworkFacts] = field(default_factory=list)


def inspect(uri: str, tokenizer: str | None = None, prediction_type: str | None = None) -> Inspection:
    """Look a model up as a job would, and gather every complaint instead of ending with the first."""
    try:
        checkpoint = open_checkpoint(uri, tokenizer, prediction_type)
    except ModelError as error:
        return Inspection(uri, [str(error)])
    problems = [problem for component in checkpoint.components for problem in _problems(component)]
    width, height = checkpoint.default_size
    return Inspection(
        uri,
        problems,
        path=str(checkpoint.path),
        family=checkpoint.family,
        layout=checkpoint.layout,
        prediction_type=checkpoint.schedule.prediction_type,
        zero_terminal_snr=checkpoint.schedule.rescale_betas_zero_snr,
        width=width,
        height=height,
        half_precision_peak=_peak(checkpoint) if not problems else None,
        tokenizers=_tokenizers(checkpoint),
        networks=[_network(component) for component in checkpoint.components],
    )


def _problems(component: Component) -> list[str]:
    try:
        component.skeleton()
    except ModelError as error:
        return [f"{component.name}: {error}"]
    return []


def _peak(checkpoint: Checkpoint) -> int:
    width, height = checkpoint.default_size
    return peak_bytes(checkpoint, dtype="float16", batch=1, width=width, height=height, on_gpu=True).peak


def _network(component: Component) -> NetworkFacts:
    keys = {origin.key for origin in component.origins.values()} & component.weights.shapes.keys()
    counts = {key: math.prod(component.weights.shapes[key]) for key in keys}
    formats = {key: component.weights.dtypes[key] for key in keys}
    size = sum(counts[key] * _BYTES.get(formats[key], 4) for key in keys)
    return NetworkFacts(component.name, sum(counts.values()), sorted(set(formats.values())), size)


_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}


def _tokenizers(checkpoint: Checkpoint) -> list[str]:
    return [
        f"CLIP byte-pair encoding, {len(tokenizer.vocab):,} tokens, {tokenizer.max_length} at once, "
        f"padded with {tokenizer.pad_token!r}"
        for tokenizer in checkpoint.tokenizers
    ]
