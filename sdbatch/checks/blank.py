"""Blank pictures: (almost) one colour, as a model draws that has broken down."""

from __future__ import annotations

import math

import numpy as np


def contrast(pixels: np.ndarray) -> float:
    """Of a picture (H, W, 3) uint8 the standard deviation of its levels, 0 to 255, in the channel with the largest."""
    return round(max(_deviation(pixels[:, :, channel]) for channel in range(3)), 2)


def _deviation(levels: np.ndarray) -> float:
    """In whole numbers up to the root, so that no order of summing changes a bit."""
    counts = np.bincount(levels.flatten(), minlength=256)
    count, each = int(counts.sum()), np.arange(256)
    total, squares = int(counts @ each), int(counts @ each**2)
    return math.sqrt((count * squares - total**2) / count**2)
