"""From prompts to what text encoders read: emphasis, and texts longer than the encoder.

A text encoder reads ``max_length`` tokens. A longer prompt is cut there, or read in chunks of that length whose
states are put one after the other. Emphasis is the notation of image UIs: ``(word)`` weighs 1.1, ``[word]`` 1/1.1,
``(word:1.3)`` 1.3; brackets nest, and a backslash before one makes it an ordinary character.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sdbatch.diffusion.tokenizer import CLIPTokenizer

_PIECES = re.compile(r"\\[()\[\]\\]|[(\[]|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[)\]]|[^\\()\[\]:]+|[\\:]")
_STEP, _MOST = 1.1, 1e3


def parse_emphasis(prompt: str) -> list[tuple[str, float]]:
    """The prompt's parts, each with its weight. Brackets that are never closed count to the end."""
    parts: list[tuple[str, float]] = []
    round_, square = [], []  # of each open bracket, the first part inside it; UIs match the two kinds apart

    def weigh(first: int, factor: float) -> None:
        # Larger weights would leave the range of float16.
        parts[first:] = [(text, max(-_MOST, min(weight * factor, _MOST))) for text, weight in parts[first:]]

    for found in _PIECES.finditer(prompt):
        piece = found.group()
        if piece[0] == "\\" and len(piece) == 2:
            parts.append((piece[1], 1.0))
        elif piece == "(":
            round_.append(len(parts))
        elif piece == "[":
            square.append(len(parts))
        elif found.group(1) is not None and round_:
            weigh(round_.pop(), float(found.group(1)))
        elif piece == ")" and round_:
            weigh(round_.pop(), _STEP)
        elif piece == "]" and square:
            weigh(square.pop(), 1 / _STEP)
        else:
            parts.append((piece, 1.0))
    for first in round_:
        weigh(first, _STEP)
    for first in square:
        weigh(first, 1 / _STEP)
    merged: list[tuple[str, float]] = []
    for text, weight in parts:
        if merged and merged[-1][1] == weight:
            merged[-1] = (merged[-1][0] + text, weight)
        else:
            merged.append((text, weight))
    return merged or [("", 1.0)]


@dataclass(frozen=True)
class Read:
    """A prompt as a text encoder reads it."""

    chunks: list[list[int]]  # token ids, ``max_length`` each
    weights: list[list[float]]  # of every token
    length: int  # tokens of the whole text

    @property
    def weighted(self) -> bool:
        return any(weight != 1.0 for row in self.weights for weight in row)


def read_prompts(tokenizer: CLIPTokenizer, prompts: Sequence[str], *, chunked: bool, emphasis: bool) -> list[Read]:
    """Each prompt in chunks; in one, cut where it must be, unless ``chunked``."""
    parts = [parse_emphasis(prompt) if emphasis else [(prompt, 1.0)] for prompt in prompts]
    encoded = iter(tokenizer.encode([text for row in parts for text, _ in row]))
    reads = []
    for row in parts:
        ids: list[int] = []
        weights: list[float] = []
        for (_, weight), found in zip(row, encoded, strict=False):
            ids += found
            weights += [weight] * len(found)
        reads.append(_frame(tokenizer, ids, weights, chunked))
    return reads


def chunks_needed(tokenizer: CLIPTokenizer, prompts: Sequence[str], *, emphasis: bool) -> list[int]:
    """In how many chunks each prompt can be read whole."""
    return [len(read.chunks) for read in read_prompts(tokenizer, prompts, chunked=True, emphasis=emphasis)]


def _frame(tokenizer: CLIPTokenizer, ids: list[int], weights: list[float], chunked: bool) -> Read:
    room = tokenizer.room
    starts = range(0, max(len(ids), 1), room) if chunked else range(1)
    rows = [[1.0, *weights[start : start + room]] for start in starts]
    return Read(
        [tokenizer.frame(ids[start : start + room]) for start in starts],
        [row + [1.0] * (tokenizer.max_length - len(row)) for row in rows],
        len(ids),
    )
