"""Prompt tables and the image requests that their rows become."""

from sdbatch.prompts.plan import (
    SLICE_ROWS,
    OddSize,
    RowIds,
    Run,
    cut,
    from_table,
    odd_sizes,
    requests_of_slice,
    to_table,
)
from sdbatch.prompts.request import ImageRequest, ModelFacts, Shape, image_seed, requests_of_row
from sdbatch.prompts.table import InputFile, Table, changed_files, find_table

__all__ = [
    "SLICE_ROWS",
    "ImageRequest",
    "InputFile",
    "ModelFacts",
    "OddSize",
    "RowIds",
    "Run",
    "Shape",
    "Table",
    "changed_files",
    "cut",
    "find_table",
    "from_table",
    "image_seed",
    "odd_sizes",
    "requests_of_row",
    "requests_of_slice",
    "to_table",
]
