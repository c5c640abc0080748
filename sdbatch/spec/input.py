"""The prompt table, and what of it goes where."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from sdbatch.spec.section import Section, Uri
from sdbatch.spec.words import suggest

#: Fields of an image request that a column of the table may give, row by row.
MAPPABLE = (
    "id",
    "prompt",
    "negative_prompt",
    "seed",
    "width",
    "height",
    "num_inference_steps",
    "guidance_scale",
    "sampler",
    "num_images_per_prompt",
    "init_image",
    "mask_image",
    "strength",
)

#: Columns of the metadata table; a user's column can't be kept under one of these names.
METADATA_COLUMNS = (
    "image_id",
    "row_id",
    "shard",
    "prompt",
    "template",
    "negative_prompt",
    "seed",
    "width",
    "height",
    "num_inference_steps",
    "guidance_scale",
    "sampler",
    "init_image",
    "mask_image",
    "strength",
    "truncated",
    "model",
    "model_sha256",
    "path",
    "file_name",
    "bytes",
    "sha256",
    "status",
    "error",
    "image",
)


class Input(Section):
    """The prompt table."""

    uri: Uri = Field(
        description="A file, a folder or a glob; a path, s3://bucket/…, gs://bucket/…, az://container/… or "
        "hf://datasets/OWNER/NAME/…; may hold variables"
    )
    format: Literal["parquet", "csv", "tsv", "jsonl", "text"] | None = Field(
        None, description="Told by the file's ending when left out"
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description=f"Field → column of the table; fields: {', '.join(MAPPABLE)}"
    )
    keep: list[str] | dict[str, str] = Field(
        default_factory=list, description="Columns carried into the metadata: a list, or new name → column"
    )
    limit: int | None = Field(None, ge=1, description="Use only this many rows, from the top")

    @field_validator("columns")
    @classmethod
    def _known_fields(cls, columns: dict[str, str]) -> dict[str, str]:
        for name in columns:
            if name not in MAPPABLE:
                raise ValueError(f"'{name}' is no field that a column can give; {suggest(name, MAPPABLE)}")
        return columns

    @field_validator("keep")
    @classmethod
    def _free_names(cls, keep: list[str] | dict[str, str]) -> list[str] | dict[str, str]:
        names = list(keep)
        for name in names:
            if name in METADATA_COLUMNS:
                raise ValueError(
                    f"'{name}' is a metadata column of sdbatch; keep yours under another name, "
                    f"such as keep: {{my_{name}: {name}}}"
                )
        if len(set(names)) < len(names):
            raise ValueError("names a column twice")
        return keep

    @property
    def kept(self) -> dict[str, str]:
        """Name in the metadata → column of the table."""
        return self.keep if isinstance(self.keep, dict) else {name: name for name in self.keep}

    @property
    def prompt_column(self) -> str:
        return self.columns.get("prompt", "prompt")
