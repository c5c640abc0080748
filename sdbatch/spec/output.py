"""Where pictures go, and in what form."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from sdbatch.spec.section import Section, Uri
from sdbatch.spec.words import shown

_MOST_SIDE = 16383  # of a WebP picture
_LONGEST = 10


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


class Rendition(Section):
    """Every picture once more, in another size or shape."""

    size: str | None = Field(None, description="Pixels, WIDTHxHEIGHT: the picture is scaled to it")
    aspect: str | None = Field(None, description="Or a shape, 4:5, of as many of the picture's own pixels as fit")
    fit: Literal["crop", "pad"] = Field("crop", description="Fill the frame and cut what sticks out, or show all of it")
    background: str = Field("#000000", pattern="^#[0-9a-fA-F]{6}$", description="Colour of what pad leaves free")

    @model_validator(mode="after")
    def _one_frame(self) -> Self:
        if (self.size is None) == (self.aspect is None):
            raise ValueError("needs either size, as 512x512, or aspect, as 4:5")
        return self

    @field_validator("size")
    @classmethod
    def _is_size(cls, size: str | None) -> str | None:
        known = re.fullmatch("([0-9]{1,5})x([0-9]{1,5})", size or "1x1")
        if known is None or not all(1 <= int(side) <= _MOST_SIDE for side in known.groups()):
            raise ValueError(f"should be WIDTHxHEIGHT in pixels, each from 1 to {_MOST_SIDE:,}: 512x512")
        return size

    @field_validator("aspect")
    @classmethod
    def _is_aspect(cls, aspect: str | None) -> str | None:
        side = r"([1-9][0-9]{0,3}(?:\.[0-9]{1,3})?)"
        known = re.fullmatch(f"{side}:{side}", aspect or "1:1")
        if known is None or not 1 / _LONGEST <= float(known[1]) / float(known[2]) <= _LONGEST:
            raise ValueError(
                f"should be WIDTH:HEIGHT, one of them at most {_LONGEST} times the other: 1:1, 4:5, 16:9, 1.91:1"
            )
        return aspect


def _check_names(renditions: dict[str, Rendition]) -> dict[str, Rendition]:
    for name in renditions:
        if not re.fullmatch("[a-z0-9][a-z0-9_-]{0,39}", name) or name in {"default", "thumbnails"}:
            raise ValueError(
                f"has the name {shown(name)}; names become folders: lower case letters, digits, dash and underscore, "
                "and neither default nor thumbnails"
            )
    return renditions


class Output(Section):
    """Where pictures and metadata go."""

    uri: Uri = Field(
        description="A folder or s3://bucket/prefix; may hold variables: {name}, {date}, {year}, {month}, {day}, {week}"
    )
    format: Literal["images", "webdataset", "parquet"] = Field("images", description="Form of the shards")
    image: Picture = Field(default_factory=lambda: Picture())
    renditions: Annotated[dict[str, Rendition], AfterValidator(_check_names)] = Field(
        default_factory=dict,
        description="Name → every picture once more in another size or shape, in a folder renditions/NAME",
    )
    thumbnail: int | None = Field(
        None, ge=16, le=1024, description="Also small WebP pictures in thumbnails/, this many pixels on the longer side"
    )
    license: str | None = Field(
        None,
        pattern="^[a-z0-9][a-z0-9.+-]{0,63}$",
        description="What the data card says of the pictures' licence, by its short name: cc-by-4.0, openrail++, other",
    )
    c2pa: Credentials | None = Field(None, description="Sign every picture; needs the extra sdbatch[c2pa]")
    shard_size: int = Field(64, ge=1, le=100_000, description="Images a shard: the unit of work and of commit")

    @property
    def copied_to(self) -> list[str]:
        """Where pictures lie once more: folders of renditions and thumbnails."""
        return [*(f"renditions/{name}" for name in self.renditions), *(["thumbnails"] if self.thumbnail else [])]
