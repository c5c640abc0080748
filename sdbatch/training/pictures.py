"""Pictures to train on: looked at by their headers, then brought to size one by one."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sdbatch.errors import InputError

#: A picture with more pixels than this is refused before it is unpacked.
MOST_PIXELS = 64_000_000


@dataclass(frozen=True)
class CaptionedPicture:
    """A picture that is not opened yet: a file, or ``size`` bytes of one from ``offset`` on."""

    name: str  # for messages: the path from the folder on; of a member "SHARD.tar#MEMBER"
    caption: str
    file: Path
    offset: int = 0
    size: int = -1  # to the end

    def read(self) -> bytes:
        """The picture's bytes as they are stored."""
        try:
            with self.file.open("rb") as file:
                file.seek(self.offset)
                return file.read(self.size)
        except OSError as error:
            raise InputError(f"picture {self.name} can't be read: {error.strerror}") from None


def prepare(picture: CaptionedPicture, width: int, height: int) -> np.ndarray:
    """The picture (height, width, 3) uint8: turned as its EXIF data say, put on white where it is transparent, resized
    until it just covers the size, cut to it around its centre. Raises InputError when it can't be decoded."""
    data = picture.read()
    try:
        image = ImageOps.exif_transpose(open_header(io.BytesIO(data)))
        if image.mode.startswith("I"):  # Pillow would cut 16 bits off at 255 instead of scaling them
            image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        # Cuts before it resizes: a long thin picture would otherwise grow without bounds.
        fitted = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    except Exception as error:  # Pillow's readers raise whatever a damaged file makes them
        raise InputError(f"picture {picture.name} can't be read: {error}; replace or remove it") from None
    return np.asarray(fitted)


def open_header(stream: IO[bytes]) -> Image.Image:
    """The picture, not decoded yet. Raises ValueError if it is none or too large; Pillow may raise anything else."""
    try:
        image: Image.Image = Image.open(stream, formats=("PNG", "JPEG", "WEBP"))
    except UnidentifiedImageError:
        raise ValueError("no PNG, JPEG or WebP picture") from None
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels, more than {MOST_PIXELS:,}")
    return image
