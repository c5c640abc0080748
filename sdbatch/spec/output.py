"""Where pictures go, and in what form."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from sdbatch.spec.section import Section, Uri


class Picture(Section):
    """How a picture is encoded."""

    type: Literal["png", "jpeg", "webp"] = Field("png", description="File format")
    quality: int = Field(90, ge=1, le=100, description="Of jpeg and webp")
    lossless: bool = Field(False, description="webp that keeps every pixel; quality then says nothing")

    @model_validator(mode="after")
    def _can_be_lossless(self) -> Self:
        if self.lossless and self.type != "webp":
            told = "is lossless as it is" if self.type == "png" else "has no lossless form"
            raise ValueError(f"has lossless, but {self.type} {told}; set type: webp, or leave lossless out")
        return self


class Credentials(Section):
    """A manifest in every picture, signed with a key of yours as C2PA."""

    certificate: str = Field(min_length=1, description="A PEM file: the signer's certificate, then those it rests on")
    key: str | None = Field(None, min_length=1, description="A PEM file with its private key, on every node")
    key_env: str | None = Field(
        None, pattern="^[A-Za-z_][A-Za-z0-9_]*$", description="Or the environment variable that holds the key's PEM"
    )

    @model_validator(mode="after")
    def _one_key(self) -> Self:
        if (self.key is None) == (self.key_env is None):
            raise ValueError("needs either key or key_env")
        return self


class Output(Section):
    """Where pictures and metadata go."""

    uri: Uri = Field(
        description="A folder or s3://bucket/prefix; may hold variables: {name}, {date}, {year}, {month}, {day}, {week}"
    )
    format: Literal["images", "webdataset", "parquet"] = Field("images", description="Form of the shards")
    image: Picture = Field(default_factory=lambda: Picture())
    license: str | None = Field(
        None,
        pattern="^[a-z0-9][a-z0-9.+-]{0,63}$",
        description="What the data card says of the pictures' licence, by its short name: cc-by-4.0, openrail++, other",
    )
    c2pa: Credentials | None = Field(None, description="Sign every picture; needs the extra sdbatch[c2pa]")
    shard_size: int = Field(64, ge=1, le=100_000, description="Images a shard: the unit of work and of commit")
