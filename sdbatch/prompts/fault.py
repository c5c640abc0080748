"""What is wrong with a row."""

from __future__ import annotations


class BadValue(ValueError):
    """A row that can't be made; the message becomes its fault."""
