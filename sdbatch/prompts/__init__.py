"""Prompt tables and the image requests that their rows become."""

from sdbatch.prompts.plan import (
    SLICE_ROWS,
    OddSize,
    RowIds,
    Run,
    cut,
    doubled_ids,
    from_table,
    odd_sizes,
    requests_of_slice,
    rows_sha256,
    to_table,
    usable_ids,
)
from sdbatch.prompts.request import ImageRequest, ModelFacts, Shape, image_seed, requests_of_row
from sdbatch.prompts.table import InputFile, Table, changed_files, find_table, unlike_growth
from sdbatch.prompts.variants import check_prompts, images_a_row, template_columns
from sdbatch.prompts.wildcards import WildcardFiles, read_wildcards

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
    "WildcardFiles",
    "changed_files",
    "check_prompts",
    "cut",
    "doubled_ids",
    "find_table",
    "from_table",
    "image_seed",
    "images_a_row",
    "odd_sizes",
    "read_wildcards",
    "requests_of_row",
    "requests_of_slice",
    "rows_sha256",
    "template_columns",
    "to_table",
    "unlike_growth",
    "usable_ids",
]
