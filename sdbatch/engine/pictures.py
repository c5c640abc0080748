"""Pictures that requests start from, and masks: read, checked, brought to size."""

from __future__ import annotations

import io
import posixpath
import warnings

import numpy as np
from PIL import Image, ImageOps

from sdbatch.errors import StorageError
from sdbatch.storage import read_object

#: A picture with more pixels than this is refused before it is unpacked.
MOST_PIXELS = 100_000_000
_FORMATS = ("PNG", "JPEG", "WEBP")


class BadPicture(ValueError):
    """A picture that can't be used; the message becomes the request's error."""


def read_picture(where: str, base: str, size: tuple[int, int]) -> np.ndarray:
    """A picture (H, W, 3) uint8, resized to ``size`` (width, height). ``base``: where relative paths begin."""
    image = _open(where, base, "init_image").convert("RGB")
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS))


def read_mask(where: str, base: str, size: tuple[int, int]) -> np.ndarray:
    """A mask (H, W) bool, resized to ``size``: True, where it is light, is painted anew."""
    image = _open(where, base, "mask_image").convert("L")
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS)) >= 128


def folder_of(uri: str) -> str:
    """The folder that a table's relative paths begin at: the table's own."""
    plain = uri.partition("*")[0]
    is_folder = plain == uri and "." not in uri.rpartition("/")[2]
    return uri.rstrip("/") if is_folder else plain.rpartition("/")[0]


def _open(where: str, base: str, field: str) -> Image.Image:
    scheme, there, path = (where if "://" in where or where.startswith("/") else f"{base}/{where}").rpartition("://")
    uri = f"{scheme}{there}{posixpath.normpath(path)}"
    try:
        data = read_object(uri)
    except StorageError as error:
        raise BadPicture(f"{field}: {error}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
            if image.width * image.height > MOST_PIXELS:
                raise BadPicture(f"{field}: {where} has {image.width}x{image.height} pixels, more than are read")
            return ImageOps.exif_transpose(image)
    except BadPicture:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadPicture(f"{field}: {where} has more pixels than are read") from None
    except Exception as error:  # Pillow's readers raise whatever a damaged file makes them
        raise BadPicture(f"{field}: {where} is no PNG, JPEG or WebP picture that can be read: {error}") from None
