"""What a shard has cost in processes, written down outside them, so that a request that kills is found.

    _sdbatch/attempts/0000012.json     {"batches": {"8": [HOW, HOW]}, "requests": {"9": [HOW]}}

Only shards that were in work when a process died have one. A batch goes by the position of its first request in
the shard; ``requests`` are those that had a process to themselves. HOW tells in plain words how each process died.
The driver alone writes it, and reads it again when a job is resumed; a shard that is made anew under another
edition starts with a clean sheet.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field

from sdbatch.errors import StorageError
from sdbatch.storage import Store

_PREFIX = "_sdbatch/attempts/"
#: Deaths after which a batch is made request by request.
_SUSPECT = 2

Deaths = Mapping[int, tuple[str, ...]]


@dataclass(frozen=True)
class Attempts:
    """The deaths that a shard was in work at: position → how each process died."""

    batches: Deaths = field(default_factory=dict)
    requests: Deaths = field(default_factory=dict)

    def after(self, position: int, alone: bool, how: str) -> Attempts:
        """With one death more: of the batch that begins at ``position``, or of the request there if it was alone."""
        deaths = self.requests if alone else self.batches
        more = {**deaths, position: (*deaths.get(position, ()), how)}
        return Attempts(self.batches, more) if alone else Attempts(more, self.requests)

    def suspect(self, first: int, positions: Collection[int]) -> bool:
        """Should the batch that begins at ``first`` and has requests at ``positions`` be made one by one?"""
        return len(self.batches.get(first, ())) >= _SUSPECT or any(position in self.requests for position in positions)

    def killer(self, position: int, most: int) -> str | None:
        """What is held against a request that killed its process ``most`` times; None if it did not."""
        deaths = self.requests.get(position, ())
        if len(deaths) < most:
            return None
        return f"it killed its process {len(deaths)} times: {'; '.join(dict.fromkeys(deaths))}"


UNTRIED = Attempts()


def put_attempts(store: Store, stem: str, attempts: Attempts) -> None:
    store.put(f"{_PREFIX}{stem}.json", json.dumps(asdict(attempts), ensure_ascii=False).encode())


def troubled_shards(store: Store) -> set[str]:
    """The stems of all shards that have cost a process, by a listing alone."""
    return {entry.key.removeprefix(_PREFIX).removesuffix(".json") for entry in store.list(_PREFIX)}


def read_attempts(store: Store, stem: str) -> Attempts:
    """Of a shard that has any."""
    key = f"{_PREFIX}{stem}.json"
    try:
        content = json.loads(store.get(key))
        batches, requests = (
            {int(position): tuple(map(str, deaths)) for position, deaths in content[kind].items()}
            for kind in ("batches", "requests")
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StorageError(f"{store.uri}/{key} is damaged: {error}; it can be removed") from None
    return Attempts(batches, requests)
