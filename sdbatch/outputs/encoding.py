"""From pixels to the bytes of a picture file, with what made it written inside."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import numpy as np
from PIL import Image, PngImagePlugin

from sdbatch.spec import Picture

#: https://cv.iptc.org/newscodes/digitalsourcetype/
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
_USER_COMMENT = 0x9286
_EXIF_IFD = 0x8769


def encode(pixels: np.ndarray, form: Picture, row: Mapping[str, Any]) -> bytes:
    """Encode (H, W, 3) uint8 as PNG, JPEG or WebP. The same pixels and row give the same bytes.

    ``row`` is the image's metadata: prompt, seed and the rest go into the text chunk that image UIs read
    (or the EXIF comment, where the format has no text), the IPTC digital source type into XMP.
    """
    picture, buffer = Image.fromarray(pixels), io.BytesIO()
    told, xmp = parameters(row), _xmp(row)
    if form.type == "png":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("parameters", told) if not told.isascii() else info.add_text("parameters", told)
        info.add_itxt("XML:com.adobe.xmp", xmp)
        picture.save(buffer, "PNG", pnginfo=info, compress_level=6)
    else:
        exif = Image.Exif()
        exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"UNICODE\0" + told.encode("utf-16-be")
        picture.save(buffer, form.type.upper(), quality=form.quality, exif=exif, xmp=xmp.encode())
    return buffer.getvalue()


def opens(data: bytes) -> bool:
    """Are these the bytes of a whole picture?"""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as picture:
            picture.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
    return True


def parameters(row: Mapping[str, Any]) -> str:
    """Generation parameters in the lines that image UIs write and read back."""
    lines = [str(row["prompt"])]
    if row["negative_prompt"]:
        lines.append(f"Negative prompt: {row['negative_prompt']}")
    lines.append(
        f"Steps: {row['num_inference_steps']}, Sampler: {row['sampler']}, CFG scale: {row['guidance_scale']:g}, "
        f"Seed: {row['seed']}, Size: {row['width']}x{row['height']}, "
        f"Model hash: {str(row['model_sha256'])[:10]}, Model: {row['model']}"
    )
    return "\n".join(lines)


def _xmp(row: Mapping[str, Any]) -> str:
    prompt = "".join(char for char in str(row["prompt"]) if char.isprintable())
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
        'xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:xmp="http://ns.adobe.com/xap/1.0/" '
        f'Iptc4xmpExt:DigitalSourceType="{SOURCE_TYPE}" xmp:CreatorTool={quoteattr("sdbatch " + str(row["model"]))}>'
        f'<dc:description><rdf:Alt><rdf:li xml:lang="x-default">{escape(prompt)}</rdf:li></rdf:Alt></dc:description>'
        "</rdf:Description></rdf:RDF></x:xmpmeta>"
    )
