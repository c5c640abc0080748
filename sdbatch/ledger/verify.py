"""The proof that every planned image ended exactly once, from the stored bytes.

Slice by slice, so that a job of any size is checked in the memory that one slice takes.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Any

import pyarrow as pa

from sdbatch.errors import ObjectNotFound, StorageError
from sdbatch.ledger.commits import TOTALS_KEY, CommitRecord, Commits, read_totals
from sdbatch.ledger.plan import Job, Shard, read_job, read_shards, read_slice, shard_stem
from sdbatch.ledger.rounds import newest_round
from sdbatch.spec import Output
from sdbatch.storage import Entry, Store, at_once
from sdbatch.storage.parquet import read_parquet

#: Pictures by their paths, and the sha256 of each object that holds several, by its key.
Read = Callable[[Store, Iterable[str]], tuple[dict[str, bytes], dict[str, str]]]
#: Can a picture's bytes be opened and drawn?
Opens = Callable[[bytes], bool]
Progress = Callable[[int, int], None]

_CHECKERS = 8
#: Below what an object lies, and the part of its key that tells its shard and edition.
_PLACE = re.compile(r"(?:renditions/[^/]+|[^/]+)/([^/.]*)")


@dataclass
class Verdict:
    """What :func:`verify` found. Lists hold image ids, or keys of objects that belong to no single picture's row;
    ``leftover`` and ``extra`` hold keys alone."""

    planned: int = 0
    committed: int = 0
    quarantined: int = 0
    checked: int = 0  # images whose bytes were read; the rest is in a sample's other shards
    missing: list[str] = field(default_factory=list)  # planned, but neither made nor quarantined
    doubled: list[str] = field(default_factory=list)  # recorded more than once, or not planned at all
    altered: list[str] = field(default_factory=list)  # stored bytes that are not those recorded, or no picture
    leftover: list[str] = field(default_factory=list)  # objects of shards that are done, which no record names
    extra: list[str] = field(default_factory=list)  # all others that are under data/, metadata/ and where copies lie

    @property
    def ok(self) -> bool:
        """What is left over is not: whoever reads the folders finds its pictures twice."""
        wrong = self.missing or self.doubled or self.altered or self.leftover
        return not wrong and self.planned == self.committed + self.quarantined


@dataclass(frozen=True)
class Findings:
    """What is stored of a shard. ``record`` is None when it is not committed; ``read`` is False outside a sample."""

    number: int  # the shard's
    record: CommitRecord | None
    read: bool = True
    committed: int = 0
    quarantined: int = 0
    missing: tuple[str, ...] = ()
    doubled: tuple[str, ...] = ()
    altered: tuple[str, ...] = ()
    keys: frozenset[str] = frozenset()
    damaged: tuple[int, ...] = ()  # positions whose pictures are missing or altered
    leftover: tuple[str, ...] = ()  # see Verdict; told only where all shards are read
    extra: tuple[str, ...] = ()

    @property
    def sound(self) -> bool:
        """Is all of it as it was recorded? Of what is not, ``damaged`` may be none: of a record, say."""
        return not (self.missing or self.doubled or self.altered)


def verify(store: Store, read: Read, opens: Opens, progress: Progress, sample: float = 1.0) -> Verdict:
    """Read what the ledger names and compare; of a ``sample`` that fraction of the shards."""
    job = read_job(store)
    verdict = Verdict(planned=job.planned)
    for done, found in enumerate(examine(store, job, read, opens, sample), 1):
        verdict.committed += found.committed
        verdict.quarantined += found.quarantined
        verdict.checked += found.committed + found.quarantined if found.read else 0
        verdict.missing += found.missing
        verdict.doubled += found.doubled
        verdict.altered += found.altered
        verdict.leftover += found.leftover
        verdict.extra += found.extra
        progress(done, job.shards)
    if sample == 1.0 and verdict.ok:
        _compare_totals(store, job, verdict)
    return verdict


def _compare_totals(store: Store, job: Job, verdict: Verdict) -> None:
    """Raise StorageError if a status of this sound output would not say so."""
    again, totals = newest_round(store), read_totals(store)
    told = totals.shards, totals.committed, totals.quarantined
    in_work = again is not None and not again.finished(Commits(store))
    if not in_work and told != (job.shards, verdict.committed, verdict.quarantined):
        raise StorageError(f"{store.uri}/{TOTALS_KEY} is damaged: it does not agree with the commit records; remove it")


def examine(store: Store, job: Job, read: Read, opens: Opens, sample: float = 1.0) -> Iterator[Findings]:
    """What is stored of every shard of the job, in their order."""
    found = _examine_all(store, job, read, opens, sample)
    if sample < 1.0:  # what no record names can be told only where all records are read
        yield from found
        return
    again, roots = newest_round(store), ["data", "metadata", *Output.model_validate(job.spec["output"]).copied_to]
    listings = [_Listing(store.list(f"{root}/")) for root in roots]
    for one in found:
        number = one.number
        whole = number == job.shards - 1
        stored = (key for listing in listings for key in listing.up_to(None if whole else number))
        unnamed = [key for key in stored if key not in one.keys]
        stems = set[str]()
        if one.record is not None and one.sound:  # else pictures may be unnamed because their names were lost
            stems = {_stem(key) for key in unnamed if re.fullmatch(rf"{number:07d}(r\d+)?", _stem(key))}
            if again is not None and number in again.shards and one.record.edition < again.edition:
                stems -= {shard_stem(number, again.edition)}  # it is in work
        leftover = tuple(key for key in unnamed if _stem(key) in stems)
        yield replace(one, leftover=leftover, extra=tuple(key for key in unnamed if _stem(key) not in stems))


def _stem(key: str) -> str:
    """What the keys of a shard's objects have in common, if it is one of those."""
    found = _PLACE.match(key)
    return found[1] if found else ""


def _examine_all(store: Store, job: Job, read: Read, opens: Opens, sample: float) -> Iterator[Findings]:
    commits = Commits(store)
    chance = random.Random(job.fingerprint)
    with ThreadPoolExecutor(_CHECKERS) as pool:
        for number, shards in groupby(read_shards(store, job), key=lambda shard: shard.slice):
            records = commits.of_slice(number)
            ids = read_slice(store, job, number).column("image_id")

            def check(
                shard: Shard, chosen: bool, records: dict[int, CommitRecord] = records, ids: pa.ChunkedArray = ids
            ) -> Findings:
                planned = ids.slice(shard.offset, shard.count).to_pylist()
                if len(planned) != shard.count:
                    raise StorageError(f"plan slice {shard.slice} is damaged: shard {shard.number} is cut off")
                record = records.get(shard.number)
                if record is None:
                    return Findings(shard.number, None, chosen, missing=tuple(planned))
                if not chosen:
                    return Findings(shard.number, record, chosen, record.committed, record.quarantined)
                fingerprint = job.part_of_slice(shard.slice).fingerprint
                return examine_shard(store, record, fingerprint, planned, read, opens)

            several = list(shards)
            yield from pool.map(check, several, [chance.random() < sample for _ in several])


def examine_shard(
    store: Store, record: CommitRecord, fingerprint: str, planned: list[str] | None, read: Read, opens: Opens
) -> Findings:
    """What is stored of a shard whose record should have this ``fingerprint``; of what has no plan, None is planned."""
    rows, objects = _metadata(store, record)
    if rows is None or record.fingerprint != fingerprint:
        lost = [record.metadata_key] if planned is None else planned
        keys = frozenset([record.metadata_key])
        return Findings(record.shard, record, altered=tuple(lost), keys=keys, damaged=tuple(range(len(lost))))
    recorded = [row["image_id"] for row in rows]
    planned = recorded if planned is None else planned
    pictures, sums = read(store, [row["path"] for row in rows if row["status"] == "committed"])
    missing, altered, damaged = [], [], []
    for position, row in enumerate(rows):
        if row["status"] != "committed":
            continue
        data = pictures.get(row["path"])
        if data is None:
            missing.append(row["image_id"])
        elif len(data) != row["bytes"] or hashlib.sha256(data).hexdigest() != row["sha256"] or not opens(data):
            altered.append(row["image_id"])
        else:
            continue
        damaged.append(position)
    made = sum(row["status"] == "committed" for row in rows)
    if not damaged and (not _counts(record, rows) or any(sums.get(key, sha256) != sha256 for key, sha256 in objects)):
        altered = recorded  # what the record says, or what else lies within the object that holds the pictures
    holding = {row["path"].partition("#")[0] for row in rows if row["path"]}
    others = {key: sha256 for key, sha256 in objects if key not in holding}
    for (key, sha256), told in zip(others.items(), at_once(partial(_sum, store), others), strict=True):
        if told != sha256:
            (missing if told is None else altered).append(key)
    return Findings(
        record.shard,
        record,
        committed=made - len(damaged),
        quarantined=len(rows) - made,
        missing=(*missing, *sorted(set(planned) - set(recorded))),
        doubled=tuple(sorted((Counter(recorded) - Counter(planned)).keys())),
        altered=tuple(altered),
        keys=frozenset([record.metadata_key, *holding, *(key for key, _ in objects)]),
        damaged=tuple(damaged if recorded == planned else range(len(planned))),
    )


def _counts(record: CommitRecord, rows: list[dict[str, Any]]) -> bool:
    """Does the record say what the metadata do?"""
    failures = [{"image_id": row["image_id"], "error": row["error"]} for row in rows if row["status"] == "quarantined"]
    made = [row["bytes"] for row in rows if row["status"] == "committed"]
    told = record.committed, record.quarantined, record.bytes, record.failures
    return told == (len(made), len(failures), sum(made), failures)


def _sum(store: Store, key: str) -> str | None:
    """The sha256 of an object, None where there is none."""
    try:
        return hashlib.sha256(store.get(key)).hexdigest()
    except ObjectNotFound:
        return None


def _metadata(store: Store, record: CommitRecord) -> tuple[list[dict[str, Any]] | None, Collection[tuple[str, str]]]:
    """The metadata rows that the record vouches for, None if they are gone or other ones; and each object that the
    shard has beside single pictures, with its sha256."""
    try:
        data = store.get(record.metadata_key)
    except ObjectNotFound:
        return None, ()
    if hashlib.sha256(data).hexdigest() != record.metadata_sha256:
        return None, ()
    table = read_parquet(data, ["image_id", "status", "path", "bytes", "sha256", "error"])
    return table.to_pylist(), json.loads((table.schema.metadata or {}).get(b"sdbatch.objects", b"{}")).items()


class _Listing:
    """Keys in their order, handed out shard by shard; their numbers are in the keys."""

    def __init__(self, entries: Iterator[Entry]) -> None:
        self._entries = entries
        self._next = next(entries, None)

    def up_to(self, shard: int | None) -> Iterator[str]:
        """The next keys, as far as they belong to shards up to this one; None: all that are left."""
        while self._next is not None:
            number = re.match(r"\d+", _stem(self._next.key))
            if shard is not None and number is not None and int(number[0]) > shard:
                return
            yield self._next.key
            self._next = next(self._entries, None)
