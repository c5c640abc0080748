"""Blank pictures: (almost) one colour, as a model draws that has broken down."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image


def contrast(pixels: np.ndarray) -> float:
    """Of a picture (H, W, 3) uint8 the standard deviation of its levels, 0 to 255, in the channel with the largest."""
    counts = Image.fromarray(pixels).histogram()
    return round(max(_deviation(counts[channel : channel + 256]) for channel in (0, 256, 512)), 2)


def _deviation(counts: list[int]) -> float:
    """Of levels by how often each is there; in whole numbers up to the root, so that no rounding adds up."""
    count = sum(counts)
    total = sum(level * times for level, times in enumerate(counts))
    squares = sum(level**2 * times for level, times in enumerate(counts))
    return math.sqrt((count * squares - total**2) / count**2)
