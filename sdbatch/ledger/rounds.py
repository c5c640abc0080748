"""Rounds: what is made again of shards that are committed, quarantined requests or lost pictures.

    _sdbatch/rounds/2.json   {"edition": 2, "kind": "retry", "changed": [...], "shards": {"12": [0, 1, [3, 5]]}}

A round gives each of its shards a new edition: the pictures that stay are carried over, those at the listed positions
are made. Round n is edition n; the shards' first commits are edition 1. One round is finished before the next begins.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from sdbatch.errors import StorageError
from sdbatch.ledger.commits import Commits
from sdbatch.storage import Store

_PREFIX = "_sdbatch/rounds/"


@dataclass(frozen=True)
class Again:
    """What of a shard is made again, and the edition from which the rest is carried over."""

    slice: int
    before: int
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Round:
    """What is made again, by the shards' numbers. ``changed``: ``field=value`` of the spec, for this round alone."""

    edition: int
    kind: str  # retry or repair
    changed: tuple[str, ...]
    shards: Mapping[int, Again]

    @property
    def images(self) -> int:
        return sum(len(again.positions) for again in self.shards.values())

    def finished(self, commits: Commits) -> bool:
        return all(
            (number, self.edition) in commits.single or (again.slice, self.edition) in commits.collected
            for number, again in self.shards.items()
        )


def put_round(store: Store, found: Round) -> bool:
    """Begin the round; False if another driver has begun one under this number."""
    content = {
        "edition": found.edition,
        "kind": found.kind,
        "changed": list(found.changed),
        "shards": {
            str(number): [again.slice, again.before, list(again.positions)]
            for number, again in sorted(found.shards.items())
        },
    }
    return store.put_if_absent(_key(found.edition), json.dumps(content, sort_keys=True).encode())


def _read_round(store: Store, edition: int) -> Round:
    key = _key(edition)
    try:
        content = json.loads(store.get(key))
        shards = {
            int(number): Again(slice_number, before, tuple(positions))
            for number, (slice_number, before, positions) in content["shards"].items()
        }
        return Round(content["edition"], content["kind"], tuple(content["changed"]), shards)
    except (ValueError, TypeError, KeyError) as error:
        raise StorageError(f"{store.uri}/{key} is damaged: {error}") from None


class Rounds:
    """The rounds of an output, each read once, when it is first asked for."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[int, Round] = {}

    def __getitem__(self, edition: int) -> Round:
        if edition not in self._known:
            self._known[edition] = _read_round(self._store, edition)
        return self._known[edition]

    def changed_for(self, number: int, edition: int, position: int) -> tuple[str, ...]:
        """What of the spec was otherwise when a picture of shard ``number``, as of this edition, was made."""
        while edition > 1:
            again = self[edition].shards[number]
            if position in again.positions:
                return self[edition].changed
            edition = again.before
        return ()


def newest_round(store: Store) -> Round | None:
    """The round begun last, if there ever was one."""
    names = (re.search(r"/(\d+)\.json$", entry.key) for entry in store.list(_PREFIX))
    editions = [int(name[1]) for name in names if name]
    return _read_round(store, max(editions)) if editions else None


def _key(edition: int) -> str:
    return f"{_PREFIX}{edition}.json"
