"""A matrix: values that are combined with every prompt."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from math import prod
from typing import Any

from pydantic import StrictFloat, StrictInt, StrictStr, ValidationError

from sdbatch.spec.generate import Generate
from sdbatch.spec.input import METADATA_COLUMNS
from sdbatch.spec.words import shown

#: What a matrix can vary beside words of the template: fields of an image request.
MATRIX_FIELDS = (
    "negative_prompt",
    "seed",
    "size",
    "width",
    "height",
    "num_inference_steps",
    "guidance_scale",
    "sampler",
    "strength",
)
_MOST_COMBINATIONS = 10_000
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")

#: Strict: YAML's yes and no are quoted or refused, never taken for 1 and 0.
Value = StrictStr | StrictInt | StrictFloat
Matrix = dict[str, list[Value]]


def check_matrix(matrix: Matrix) -> Matrix:
    """Raise ValueError for a name or value that can't be combined."""
    for name, values in matrix.items():
        if name in Generate.model_fields and name not in MATRIX_FIELDS:
            raise ValueError(f"{name} is the same for all images of a job: set generate.{name}")
        if name not in MATRIX_FIELDS and not _NAME.fullmatch(name):
            raise ValueError(f"{shown(name)} is no name: use letters, digits and '_', a letter first")
        if name not in MATRIX_FIELDS and name in METADATA_COLUMNS:
            raise ValueError(f"{name} is a metadata column that can't be varied; what can: {', '.join(MATRIX_FIELDS)}")
        if not values:
            raise ValueError(f"{name} has no values")
        if len(set(map(str, values))) < len(values):
            raise ValueError(f"{name} has a value twice")
        for value in values:
            _check_value(name, value)
    if "size" in matrix and {"width", "height"} & matrix.keys():
        raise ValueError("has both size and width or height")
    if prod(len(values) for values in matrix.values()) > _MOST_COMBINATIONS:
        raise ValueError(f"has more than {_MOST_COMBINATIONS:,} combinations")
    return matrix


def _check_value(name: str, value: Value) -> None:
    if name == "size":
        if not _SIZE.fullmatch(str(value)):
            raise ValueError(f"size {shown(value)} should read like 768x512")
    elif name in MATRIX_FIELDS:
        try:
            Generate.model_validate({name: value})
        except ValidationError as error:
            told = error.errors(include_url=False)[0]["msg"].lower()
            raise ValueError(f"{name} {shown(value)}: {told.replace('input ', '')}") from None


def words_of(matrix: Matrix) -> list[str]:
    """The names that are no fields of a request: words for the template."""
    return [name for name in matrix if name not in MATRIX_FIELDS]


def fields_of(matrix: Matrix) -> Iterator[str]:
    """The fields of a request that the matrix gives."""
    for name in matrix:
        if name in MATRIX_FIELDS:
            yield from ("width", "height") if name == "size" else (name,)


def odd_sizes_of(matrix: Matrix) -> Iterator[tuple[str, Value]]:
    """Names and values of sizes that are no multiple of 8."""
    for name in ("size", "width", "height"):
        for value in matrix.get(name, ()):
            if any(int(pixels) % 8 for pixels in str(value).split("x")):
                yield name, value


def combinations(matrix: Matrix) -> Iterator[Mapping[str, str]]:
    """Every combination as cells of text, by field or word; what is named last varies fastest."""
    for values in product(*matrix.values()):
        yield dict(_cells(matrix, values))


def _cells(matrix: Matrix, values: Sequence[Any]) -> Iterator[tuple[str, str]]:
    for name, value in zip(matrix, values, strict=True):
        if name == "size":
            width, _, height = str(value).partition("x")
            yield from (("width", width), ("height", height))
        else:
            yield name, str(value)
