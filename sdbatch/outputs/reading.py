"""Stored pictures, read back by their paths."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import partial

from sdbatch.errors import ObjectNotFound
from sdbatch.outputs.containers import parquet_rows, tar_members
from sdbatch.outputs.shards import DAMAGES, EncodedPicture, StoredShard
from sdbatch.storage import Store, at_once


def read_pictures(store: Store, paths: Iterable[str]) -> dict[str, bytes]:
    """The bytes of pictures by their paths, each object read once.

    A path whose picture is gone is left out; one whose object is damaged beyond reading has no bytes.
    """
    return read_stored(store, paths)[0]


def read_stored(store: Store, paths: Iterable[str]) -> tuple[dict[str, bytes], dict[str, str]]:
    """As :func:`read_pictures`, and the sha256 of each object that holds several, by its key."""
    wanted: dict[str, list[str]] = {}
    for path in paths:
        key, _, inside = path.partition("#")
        wanted.setdefault(key, []).append(inside)
    sums: dict[str, str] = {}
    single = [key for key, insides in wanted.items() if not insides[0]]
    there = zip(single, at_once(partial(_data, store), single), strict=True)
    found = {key: data for key, data in there if data is not None}
    for key, insides in wanted.items():  # one after the other: they are large
        if not insides[0] or (data := _data(store, key)) is None:
            continue
        sums[key] = hashlib.sha256(data).hexdigest()
        try:
            held = (tar_members if key.endswith(".tar") else parquet_rows)(data)
        except DAMAGES:
            held = dict.fromkeys(insides, b"")
        found |= {f"{key}#{inside}": held[inside] for inside in insides if inside in held}
    return found, sums


def as_stored(store: Store, given: Sequence[EncodedPicture], finished: StoredShard) -> list[EncodedPicture]:
    """A shard's pictures as the store holds them: those given, or another writer's, whose rows are open."""
    ours = {picture.position: picture for picture in given}
    others = [
        one.path
        for one in finished.pictures
        if one.position not in ours or hashlib.sha256(ours[one.position].data).hexdigest() != one.sha256
    ]
    read = read_pictures(store, others)
    return [
        EncodedPicture(one.position, {}, read[one.path]) if one.path in read else ours[one.position]
        for one in finished.pictures
    ]


def _data(store: Store, key: str) -> bytes | None:
    """The object's bytes, None where there is none."""
    try:
        return store.get(key)
    except ObjectNotFound:
        return None
