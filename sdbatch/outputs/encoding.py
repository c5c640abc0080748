"""From pixels to the bytes of a picture file, with what made it written inside."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from sdbatch.outputs.provenance import parameters, read_checked, xmp
from sdbatch.spec import Picture

_USER_COMMENT = 0x9286
_EXIF_IFD = 0x8769
_LOSSLESS_EFFORT = 80


def encode(
    pixels: np.ndarray, form: Picture, row: Mapping[str, Any], fingerprint: str, checked: Collection[str] = ()
) -> bytes:
    """Encode (H, W, 3) uint8 as PNG, JPEG or WebP. The same pixels, row and fingerprint give the same bytes.

    ``row`` is the image's metadata: prompt, seed and the rest go into the text chunk that image UIs read (or the EXIF
    comment, where the format has no text), and with the ``fingerprint`` of its part of the plan into XMP, together with
    the columns that checks filled in.
    """
    picture, buffer = Image.fromarray(pixels), io.BytesIO()
    told, packet = parameters(row), xmp(row, fingerprint, checked)
    if form.type == "png":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("parameters", told) if not told.isascii() else info.add_text("parameters", told)
        info.add_itxt("XML:com.adobe.xmp", packet)
        picture.save(buffer, "PNG", pnginfo=info, compress_level=6)
    else:
        exif = Image.Exif()
        exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"UNICODE\0" + told.encode("utf-16-be")
        # Without loss, quality is how hard WebP tries.
        how = {"lossless": True, "quality": _LOSSLESS_EFFORT} if form.lossless else {"quality": form.quality}
        picture.save(buffer, form.type.upper(), exif=exif, xmp=packet.encode(), **how)
    return buffer.getvalue()


def pixels_sum(data: bytes) -> str:
    """sha256 of what a picture shows, whatever else its file holds. Raises OSError for what is no picture."""
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as picture:
        return hashlib.sha256(picture.tobytes()).hexdigest()


def checked_columns(data: bytes, checked: Collection[str]) -> dict[str, Any] | None:
    """From a picture's bytes its seed and the columns that checks filled in; None unless it tells all of them."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as picture:
            packet = picture.info.get("XML:com.adobe.xmp") or picture.info.get("xmp") or ""
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return read_checked(packet.decode(errors="replace") if isinstance(packet, bytes) else packet, checked)


def opens(data: bytes) -> bool:
    """Are these the bytes of a whole picture?"""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as picture:
            picture.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
    return True
