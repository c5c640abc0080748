"""Pictures that requests start from, and masks: read, checked, brought to size."""

from __future__ import annotations

import io
import posixpath
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sdbatch.errors import StorageError, StoreAway
from sdbatch.storage import at_once, read_object

#: A picture with more pixels than this is refused before it is unpacked, as is one with a longer side: resizing takes
#: memory by both.
MOST_PIXELS = 64_000_000
MOST_SIDE = 65_535
MOST_BYTES = 256_000_000
_FORMATS = ("PNG", "JPEG", "WEBP")


class BadPicture(ValueError):
    """A picture that can't be used; the message becomes the request's error."""


#: Address → bytes, or why there are none.
Fetched = Mapping[str, bytes | StorageError]
_NOTHING: Fetched = {}


def fetch(named: Iterable[str], base: str) -> Fetched:
    """What lies in stores of the files that rows name, all at once and each of them once. Raises StoreAway."""
    addresses = {address for where in named if (address := _address(where, base)) and "://" in address}
    return dict(zip(addresses, at_once(_object, addresses), strict=True))


def read_picture(where: str, base: str, size: tuple[int, int], fetched: Fetched = _NOTHING) -> np.ndarray:
    """A picture (H, W, 3) uint8, resized to ``size`` (width, height). ``base``: where relative paths begin."""
    image = _open(where, base, "init_image", fetched).convert("RGB")
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS))


def read_mask(where: str, base: str, size: tuple[int, int], cell: int, fetched: Fetched = _NOTHING) -> np.ndarray:
    """A mask (H, W) bool, resized to ``size``: True, where it is light, is painted anew.

    It grows to whole cells of ``cell`` pixels, which are painted as one: nothing under the mask stays.
    """
    image = _open(where, base, "mask_image", fetched).convert("L")
    light = np.asarray(image.resize(size, Image.Resampling.LANCZOS)) >= 128
    cells = light.reshape(size[1] // cell, cell, size[0] // cell, cell).any(axis=(1, 3))
    return cells.repeat(cell, axis=0).repeat(cell, axis=1)


def _open(where: str, base: str, field: str, fetched: Fetched) -> Image.Image:
    address = _address(where, base)
    if address is None:
        told = ", ".join(f"{store}://…" for store in _STORES)
        raise BadPicture(f"{field}: should be a path, or begin with {told}; nothing else is read")
    data = _read(address, field, fetched)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
            if image.width * image.height > MOST_PIXELS or max(image.size) > MOST_SIDE:
                raise BadPicture(f"{field}: {where} has {image.width}x{image.height} pixels, more than are read")
            image = ImageOps.exif_transpose(image)
            # Sixteen bits a pixel: Pillow would cut them off at 255 instead of scaling them.
            return _to_8_bits(image) if image.mode.startswith("I") else image
    except BadPicture:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadPicture(f"{field}: {where} has more pixels than are read") from None
    except UnidentifiedImageError:
        raise BadPicture(f"{field}: {where} is no PNG, JPEG or WebP picture that can be read") from None
    except Exception as error:  # Pillow's readers raise whatever a damaged file makes them
        raise BadPicture(f"{field}: {where} is no PNG, JPEG or WebP picture that can be read: {error}") from None


def _address(where: str, base: str) -> str | None:
    """A whole path or an address in an object store, without ``..``. Rows may name any that there is, and nothing else:
    None."""
    whole = where if "://" in where or where.startswith("/") else f"{base}/{where}"
    scheme, _, path = whole.rpartition("://")
    path = posixpath.normpath(path)
    if scheme in {"", "file"} and path.startswith("/"):
        return path
    if scheme in _STORES and _IN_BUCKET.match(path):
        return f"{scheme}://{path}"
    return None


_STORES = ("s3", "gs", "az", "hf")
_IN_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/.")


def _object(address: str) -> bytes | StorageError:
    """The object's bytes. A store out of reach ends the job, to be resumed; anything else is the row's fault."""
    try:
        return read_object(address)
    except StoreAway:
        raise
    except StorageError as error:
        return error


def _read(uri: str, field: str, fetched: Fetched) -> bytes:
    """The file's bytes, ``fetched`` or read now."""
    if "://" in uri:
        found = fetched[uri] if uri in fetched else _object(uri)
        if isinstance(found, StorageError):
            raise BadPicture(f"{field}: {found}")
        return found
    path = Path(uri)
    try:
        if not path.is_file():  # a pipe or a device might never end
            raise BadPicture(f"{field}: {uri} {'is no file' if path.exists() else 'does not exist'}")
        size = path.stat().st_size
        if size == 0:  # as what the kernel makes up on reading, such as /proc/kmsg, says it is
            raise BadPicture(f"{field}: {uri} is empty")
        if size > MOST_BYTES:
            raise BadPicture(f"{field}: {uri} has {size:,} bytes, more than are read")
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:
        raise BadPicture(f"{field}: {uri} can't be read: {error.strerror}") from None


def _to_8_bits(image: Image.Image) -> Image.Image:
    return Image.fromarray((np.asarray(image).astype(np.float32) / 257).round().clip(0, 255).astype(np.uint8))
