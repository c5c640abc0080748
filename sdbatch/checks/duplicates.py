"""Near duplicates among many pictures, found without comparing each with each (Norouzi et al. 2012, section 3).

Hashes that differ in at most d bits are alike in at least one of d + 1 pieces, or of more: only those that share one
are compared. Small pieces are shared by many, large ones have many values to look at.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

_BITS = 64
#: Frequencies that lie side by side tell much the same of a picture: their bits go into different pieces.
_SPREAD = np.arange(_BITS) * 27 % _BITS
#: Pieces at most, unless hashes may differ in more bits.
_MOST = 16
#: Comparisons at once, which a processor's cache holds; and those made while the next value of a piece is looked up.
_AT_ONCE, _LOOK = 1 << 17, 15_000


def first_alike(hashes: np.ndarray, most: int) -> np.ndarray:
    """Of each perceptual hash (N,) uint64 the place of the first that differs from it in at most ``most`` bits.

    That is its own place where there is none before it.
    """
    _, firsts, back = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.argsort(firsts)
    firsts, back = firsts[order], np.argsort(order)[back]
    distinct = hashes[firsts]  # in their order, so that the first of several alike is the one to find
    found = np.arange(len(distinct))
    for sharing in _sharing(distinct, most):
        rows = _AT_ONCE // (len(sharing) + 1) + 1
        for start in range(0, len(sharing), rows):
            some, others = sharing[start : start + rows], sharing[: start + rows]
            near = np.bitwise_count(distinct[some][:, None] ^ distinct[others][None, :]) <= most
            found[some] = np.minimum(found[some], others[near.argmax(axis=1)])
    alike: np.ndarray = firsts[found][back]
    return alike


def _sharing(distinct: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """Places, in their order, of hashes that may differ in at most so many bits: each such pair is in one of them."""
    pieces = _pieces(len(distinct), most)
    if not pieces:
        yield np.arange(len(distinct))
        return
    bits = np.unpackbits(distinct.view(np.uint8).reshape(-1, _BITS // 8), axis=1)
    spread = np.packbits(bits[:, _SPREAD].ravel()).view(np.uint64)
    for low, high in pairwise(_BITS * number // pieces for number in range(pieces + 1)):
        piece = (spread >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        order = np.argsort(piece, kind="stable")
        bounds = np.flatnonzero(np.diff(piece[order])) + 1
        yield from (group for group in np.split(order, bounds) if len(group) > 1)


def _pieces(count: int, most: int) -> int:
    """Into how many pieces so many hashes are best cut; 0: each is compared with each."""

    def work(pieces: int) -> float:
        values = 2.0 ** (_BITS / pieces)
        return pieces * (count**2 / values + _LOOK * min(values, count))

    best = min(range(most + 1, max(_MOST, most + 1) + 1), key=work)
    return best if work(best) < count**2 else 0
