"""Where pictures go, and in what form."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sdbatch.spec.section import Section, Uri


class Picture(Section):
    """How a picture is encoded."""

    type: Literal["png", "jpeg", "webp"] = Field("png", description="File format")
    quality: int = Field(90, ge=1, le=100, description="Of jpeg and webp")


class Output(Section):
    """Where pictures and metadata go."""

    uri: Uri = Field(description="A folder or s3://bucket/prefix")
    format: Literal["images", "webdataset", "parquet"] = Field("images", description="Form of the shards")
    image: Picture = Field(default_factory=lambda: Picture())
    shard_size: int = Field(64, ge=1, le=100_000, description="Images a shard: the unit of work and of commit")
