"""Perceptual hashes: pictures that look alike have hashes that differ in few bits.

The hash is the pHash of the ImageHash package (``imagehash.phash``), so that other tools' hashes can be compared: grey
levels at 32×32 pixels, their discrete cosine transform, and of its 8×8 lowest frequencies a bit each: above the median?
"""

from __future__ import annotations

import numpy as np
from PIL import Image

_SIDE, _LOW = 32, 8
#: The rows of the discrete cosine transform, type II, that are looked at.
_COSINES = np.cos(np.pi / _SIDE * np.outer(np.arange(_LOW), np.arange(_SIDE) + 0.5))


def perceptual_hash(pixels: np.ndarray) -> str:
    """Of a picture (H, W, 3) uint8, 64 bits as 16 hexadecimal digits."""
    grey = Image.fromarray(pixels).convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    frequencies = _COSINES @ np.asarray(grey, dtype=np.float64) @ _COSINES.T
    # A plain picture's are zeros but for rounding errors, which should not decide a bit.
    frequencies = frequencies.round(3)
    bits = (frequencies > np.median(frequencies)).flatten()
    return f"{int(''.join('1' if bit else '0' for bit in bits), 2):016x}"


def distance(one: str, other: str) -> int:
    """In how many bits two hashes differ."""
    return (int(one, 16) ^ int(other, 16)).bit_count()
