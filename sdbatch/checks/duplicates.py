"""Near duplicates among many pictures, found without comparing each with each (Norouzi et al. 2012, section 3).

Hashes that differ in at most d bits are alike in at least one of d + 1 pieces: only those that share one are compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

_BITS = 64
#: Comparisons that are held at once.
_AT_ONCE = 1 << 24


def first_alike(hashes: np.ndarray, most: int) -> np.ndarray:
    """Of each perceptual hash (N,) uint64 the place of the first that differs from it in at most ``most`` bits.

    That is its own place where there is none before it.
    """
    distinct, firsts, back = np.unique(hashes, return_index=True, return_inverse=True)
    found = firsts.copy()
    for sharing in _sharing(distinct, most + 1):
        rows = max(_AT_ONCE // len(sharing), 1)
        for start in range(0, len(sharing), rows):
            some = sharing[start : start + rows]
            near = np.bitwise_count(distinct[some][:, None] ^ distinct[sharing][None, :]) <= most
            nearest = np.where(near, firsts[sharing][None, :], len(hashes)).min(axis=1)
            found[some] = np.minimum(found[some], nearest)
    alike: np.ndarray = found[back]
    return alike


def _sharing(distinct: np.ndarray, pieces: int) -> Iterator[np.ndarray]:
    """Places of hashes that have one of so many pieces in common."""
    ends = [_BITS * number // pieces for number in range(pieces + 1)]
    for low, high in pairwise(ends):
        piece = (distinct >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        order = np.argsort(piece, kind="stable")
        bounds = np.flatnonzero(np.diff(piece[order])) + 1
        yield from (group for group in np.split(order, bounds) if len(group) > 1)
