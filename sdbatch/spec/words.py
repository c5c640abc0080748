"""What was given and what is known, in the words of an error message."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

MOST_SHOWN = 100  # characters


def shown(value: Any) -> str:
    """What was given, short and harmless on a terminal."""
    if isinstance(value, int) and abs(value) >= 10**MOST_SHOWN:
        return f"a number of more than {MOST_SHOWN} digits"
    if isinstance(value, str):
        return repr(value if len(value) <= MOST_SHOWN else f"{value[:MOST_SHOWN]}…")
    return repr(value) if isinstance(value, int | float | None) else type(value).__name__


def plain(text: str) -> str:
    """Text of our own with something of the user's in it, likewise."""
    return "".join(char if char.isprintable() else "�" for char in text[: 2 * MOST_SHOWN])


def suggest(word: str, known: Sequence[str]) -> str:
    """What was meant, or all that there is."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"there is: {', '.join(known)}"
