"""Whose turn it is to compile, in a pool of which one actor compiles for all."""

from __future__ import annotations

from collections.abc import Mapping


class Turns:
    """Who compiles: one actor at a time. ``known``: shape's key → checksum of what was compiled for it."""

    def __init__(self, known: Mapping[str, str]) -> None:
        self.known = dict(known)
        self._holder: int | None = None

    def ask(self, actor: int, key: str) -> str | None:
        """The checksum of what there is; empty: the turn is this actor's; None: somebody else is at it."""
        if key in self.known:
            return self.known[key]
        if self._holder not in (None, actor):
            return None
        self._holder = actor
        return ""

    def done(self, actor: int, key: str, sha256: str) -> None:
        """An actor's turn is over; with a checksum, what it made is there for the others."""
        if sha256:
            self.known[key] = sha256
        self.leave(actor)

    def leave(self, actor: int) -> None:
        """An actor is gone, or gives up."""
        if self._holder == actor:
            self._holder = None


class Desk:
    """How an actor asks for its turn; by itself, as here, it always has it."""

    def turn(self, key: str) -> str | None:
        """See ``Turns.ask``."""
        return ""

    def turn_done(self, key: str, sha256: str) -> None:
        """See ``Turns.done``."""
