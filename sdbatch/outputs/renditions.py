"""Every picture once more, in other sizes and shapes: renditions and thumbnails.

A copy is made of the stored picture's own bytes, not of what the model drew: so it is the same whenever and by whomever
it is made, and can be made again as long as the picture is there.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from sdbatch.errors import OutputError
from sdbatch.outputs.credentials import Signer
from sdbatch.outputs.encoding import encode
from sdbatch.outputs.shards import EncodedPicture, ShardWriter, StoredShard
from sdbatch.spec import Output, Picture, Rendition

#: Pictures of a shard that are drawn in another size at once.
_COPIERS = 4

_THUMBNAIL = Picture(type="webp", quality=80)
_LANCZOS = Image.Resampling.LANCZOS
#: Pixels a side that a format has room for, at most.
_MOST_SIDE = {"jpeg": 65_500, "webp": 16_383}


@dataclass(frozen=True)
class Copies:
    """One copy of every picture: where they lie, how they are drawn and encoded, and that in words."""

    root: str
    told: str
    form: Picture
    draw: Callable[[Image.Image], Image.Image]

    def copy(self, picture: EncodedPicture, fingerprint: str, signer: Signer | None = None) -> EncodedPicture:
        """The copy of a picture as a file, what made it inside; its row has the copy's own size. Raises OutputError."""
        try:
            with Image.open(io.BytesIO(picture.data), formats=("PNG", "JPEG", "WEBP")) as opened:
                drawn = self.draw(opened.convert("RGB"))
            data = encode(np.asarray(drawn), self.form, picture.row, fingerprint)
        except (OSError, ValueError) as error:  # too large for its format, say
            told = f"{picture.row['image_id']} can't be stored as {self.form.type}: {error}"
            raise OutputError(f"{self.root}: {told}; ask for another size or type") from None
        if signer is not None:
            data = signer.signed(data, self.form.type, picture.row)
        row: dict[str, Any] = {**picture.row, "width": drawn.width, "height": drawn.height}
        return replace(picture, row=row, data=data)


def store_copies(
    asked: Sequence[Copies],
    stem: str,
    pictures: Sequence[EncodedPicture],
    fingerprint: str,
    beside: ShardWriter,
    signer: Signer | None,
) -> StoredShard:
    """Store a shard's pictures once more in each form that is ``asked`` for, as its own writer does.

    Returns all that is stored then, whoever was first; every object of it, also single pictures, has its sha256.
    Raises OutputError where a picture has no room in a form.
    """
    stored = StoredShard([], {})
    for several in asked if pictures else ():
        with ThreadPoolExecutor(_COPIERS) as pool:
            made = list(pool.map(partial(several.copy, fingerprint=fingerprint, signer=signer), pictures))
        writer = type(beside)(beside.store, several.form.type, several.root, beside.checked)
        held = writer.finish(stem, writer.keep(stem, made, last=True))
        single = {one.path: one.sha256 for one in held.pictures if "#" not in one.path}
        stored = StoredShard([*stored.pictures, *held.pictures], stored.objects | single | held.objects)
    return stored


def copies(output: Output) -> list[Copies]:
    """What the spec asks for beside the pictures themselves."""
    asked = [
        Copies(f"renditions/{name}", _told(rendition), output.image, partial(framed, rendition=rendition))
        for name, rendition in output.renditions.items()
    ]
    if output.thumbnail:
        told = f"at most {output.thumbnail} pixels a side"
        asked.append(Copies("thumbnails", told, _THUMBNAIL, partial(_within, longer=output.thumbnail)))
    return asked


def misfits(output: Output, size: tuple[int, int]) -> list[str]:
    """What of a picture of this size, width and height, is too large for its format, in words with the field."""
    most = _MOST_SIDE.get(output.image.type)
    if most is None:
        return []
    sizes = {"output.image": size}
    for name, rendition in output.renditions.items():
        if rendition.size is None:
            frame = _frame(size, str(rendition.aspect), inside=rendition.fit == "crop")
        else:
            frame = _pixels(rendition.size)
        sizes[f"output.renditions.{name}"] = frame
    return [
        f"{field}: of pictures of {size[0]}x{size[1]} it would have {width}x{height}, and {output.image.type} has at "
        f"most {most:,} pixels a side; set output.image.type: png, or another shape"
        for field, (width, height) in sizes.items()
        if max(width, height) > most
    ]


def framed(picture: Image.Image, rendition: Rendition) -> Image.Image:
    """The picture in a rendition's frame, centred."""
    if rendition.size is not None:
        size = _pixels(rendition.size)
        if rendition.fit == "crop":
            return ImageOps.fit(picture, size, _LANCZOS)
        return ImageOps.pad(picture, size, _LANCZOS, rendition.background)
    size = _frame(picture.size, str(rendition.aspect), inside=rendition.fit == "crop")
    left, top = (size[0] - picture.width) // 2, (size[1] - picture.height) // 2
    canvas = Image.new("RGB", size, rendition.background)
    canvas.paste(picture, (left, top))  # what lies outside is cut off
    return canvas


def _pixels(size: str) -> tuple[int, int]:
    width, _, height = size.partition("x")
    return int(width), int(height)


def _told(rendition: Rendition) -> str:
    frame = f"{rendition.size} pixels" if rendition.size else f"{rendition.aspect}, pixels as they are"
    return f"{frame}, cropped" if rendition.fit == "crop" else f"{frame}, padded with {rendition.background}"


def _frame(size: tuple[int, int], aspect: str, *, inside: bool) -> tuple[int, int]:
    """The largest frame of this shape inside a picture, or the smallest one round it; every pixel stays a pixel."""
    width, _, height = aspect.partition(":")
    ratio = float(width) / float(height)
    if (size[0] > size[1] * ratio) == inside:  # the height decides
        return max(round(size[1] * ratio), 1), size[1]
    return size[0], max(round(size[0] / ratio), 1)


def _within(picture: Image.Image, longer: int) -> Image.Image:
    """Reduced to so many pixels on the longer side; never enlarged."""
    small = picture.copy()
    small.thumbnail((longer, longer), _LANCZOS)
    return small
