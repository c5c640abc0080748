"""The forms in which a shard's pictures are stored: files, WebDataset tar, Parquet.

Every object is written once and never changed: where another writer's object stands already, that one is the
shard's, and what it holds is what gets recorded. So a commit can never disagree with the bytes.

Finished batches of a shard outlive the process that made them: files are where they belong at once, the other
forms keep a tar a batch under ``_sdbatch/batches/`` until the shard is committed.

A picture's ``path`` is the key of the object that holds it, with ``#`` and the place inside where several
share one: a member's name in a tar, a row's number in a Parquet file.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sdbatch.errors import ObjectNotFound, StorageError
from sdbatch.outputs.metadata import description, description_fields
from sdbatch.storage import Store

Row = Mapping[str, Any]

#: What readers of tars and Parquet files raise where one is damaged.
_DAMAGES = (tarfile.TarError, pa.ArrowException, OSError, ValueError, KeyError, TypeError, EOFError)
#: Pictures of a shard that are on their way to the store at once.
_UPLOADS = 8


@dataclass(frozen=True)
class EncodedPicture:
    """A picture ready to be stored: its place in the shard, its metadata so far, its bytes."""

    position: int
    row: Row
    data: bytes


@dataclass(frozen=True)
class StoredPicture:
    """A picture as it is stored now."""

    position: int
    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class StoredShard:
    """A shard's pictures as they are stored, and the sha256 of each object that holds several, by its key."""

    pictures: list[StoredPicture]
    objects: dict[str, str]


class ShardWriter(ABC):
    """Stores the pictures of shards. ``ending`` is that of one picture: png, jpeg or webp."""

    def __init__(self, store: Store, ending: str) -> None:
        self.store = store
        self.ending = ending

    @abstractmethod
    def kept(self, stem: str) -> dict[int, bytes]:
        """Position → bytes of the pictures of an unfinished shard that outlived their maker."""

    @abstractmethod
    def keep(self, stem: str, batch: Sequence[EncodedPicture], *, last: bool) -> list[EncodedPicture]:
        """Make a batch's pictures outlive this process; ``last`` if the shard is finished right after.

        Returns them as they are stored, which is not as given if another writer was first.
        """

    @abstractmethod
    def carry_over(self, stem: str, pictures: Sequence[EncodedPicture]) -> None:
        """Take pictures of an earlier edition, which are safe there, into this one."""

    @abstractmethod
    def finish(self, stem: str, pictures: Sequence[EncodedPicture]) -> StoredShard:
        """Store the whole shard, all kept or carried over; returns what the store holds for it then."""

    @abstractmethod
    def forget(self, stem: str) -> None:
        """Remove what only an unfinished shard needs."""


class ImageFiles(ShardWriter):
    """One object a picture: ``data/SHARD/POSITION-ID.png``."""

    def kept(self, stem: str) -> dict[int, bytes]:
        ours = re.compile(rf"data/{stem}/\d{{5,}}-[^/]*\.{self.ending}")
        keys = [entry.key for entry in self.store.list(f"data/{stem}/") if ours.fullmatch(entry.key)]
        with ThreadPoolExecutor(_UPLOADS) as pool:
            return {
                int(key.rpartition("/")[2].partition("-")[0]): data
                for key, data in zip(keys, pool.map(self.store.get, keys), strict=True)
            }

    def keep(self, stem: str, batch: Sequence[EncodedPicture], *, last: bool) -> list[EncodedPicture]:
        def put(picture: EncodedPicture) -> EncodedPicture:
            key = self._key(stem, picture)
            stored = self.store.put_if_absent(key, picture.data)
            return picture if stored else replace(picture, data=self.store.get(key))

        with ThreadPoolExecutor(_UPLOADS) as pool:
            return list(pool.map(put, batch))

    def carry_over(self, stem: str, pictures: Sequence[EncodedPicture]) -> None:
        self.keep(stem, pictures, last=False)

    def finish(self, stem: str, pictures: Sequence[EncodedPicture]) -> StoredShard:
        stored = [_stored(picture.position, self._key(stem, picture), picture.data) for picture in pictures]
        return StoredShard(stored, {})

    def forget(self, stem: str) -> None:
        pass

    def _key(self, stem: str, picture: EncodedPicture) -> str:
        return f"data/{stem}/{picture.position:05d}-{_slug(picture.row['image_id'])}.{self.ending}"


class _Container(ShardWriter):
    """One object a shard; its batches wait for it in small tars."""

    def kept(self, stem: str) -> dict[int, bytes]:
        found: dict[int, bytes] = {}
        for entry in self.store.list(f"_sdbatch/batches/{stem}/"):
            members = _tar_members(self.store.get(entry.key))
            found |= {_position(name): data for name, data in members.items() if name.endswith(f".{self.ending}")}
        return found

    def keep(self, stem: str, batch: Sequence[EncodedPicture], *, last: bool) -> list[EncodedPicture]:
        if last or not batch:
            return list(batch)
        key = f"_sdbatch/batches/{stem}/{batch[0].position:05d}.tar"
        held, _ = _write_once(self.store, key, self._tar(stem, batch), _tar_members)
        if held is None:
            return list(batch)
        stored = {_position(name): data for name, data in held.items() if name.endswith(f".{self.ending}")}
        return [replace(picture, data=stored.get(picture.position, picture.data)) for picture in batch]

    def carry_over(self, stem: str, pictures: Sequence[EncodedPicture]) -> None:
        """They are stored with the others when the shard is finished."""

    def forget(self, stem: str) -> None:
        for entry in list(self.store.list(f"_sdbatch/batches/{stem}/")):
            self.store.delete(entry.key)

    def _tar(self, stem: str, pictures: Sequence[EncodedPicture]) -> bytes:
        """A WebDataset tar: KEY.png, KEY.json and KEY.txt for each picture."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for picture in pictures:
                described = json.dumps(description(picture.row), ensure_ascii=False, sort_keys=True).encode()
                for ending, data in (
                    (self.ending, picture.data),
                    ("json", described),
                    ("txt", str(picture.row["prompt"]).encode()),
                ):
                    member = tarfile.TarInfo(f"{_member(stem, picture.position)}.{ending}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
        return buffer.getvalue()


class WebDataset(_Container):
    """One tar a shard: ``data/SHARD.tar``."""

    def finish(self, stem: str, pictures: Sequence[EncodedPicture]) -> StoredShard:
        key = f"data/{stem}.tar"
        held, sha256 = _write_once(self.store, key, self._tar(stem, pictures), _tar_members)
        if held is None:
            held = {f"{_member(stem, picture.position)}.{self.ending}": picture.data for picture in pictures}
        stored = [
            _stored(_position(name), f"{key}#{name}", data)
            for name, data in held.items()
            if name.endswith(f".{self.ending}")
        ]
        return StoredShard(stored, {key: sha256})


class ParquetFiles(_Container):
    """One Parquet file a shard, ``data/SHARD.parquet``: the picture's bytes in ``image``, then the metadata columns."""

    def finish(self, stem: str, pictures: Sequence[EncodedPicture]) -> StoredShard:
        key = f"data/{stem}.parquet"
        rows = [
            {
                "image": {"bytes": picture.data, "path": f"{_member(stem, picture.position)}.{self.ending}"},
                **description(picture.row),
            }
            for picture in pictures
        ]
        image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        schema = pa.schema([("image", image), *description_fields(pictures[0].row)])
        # Pictures are compressed already.
        compression = dict.fromkeys(schema.names, "zstd") | {"image.bytes": "none", "image.path": "zstd"}
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer, compression=compression)
        held, sha256 = _write_once(self.store, key, buffer.getvalue(), _parquet_images)
        if held is None:
            held = {f"{_member(stem, picture.position)}.{self.ending}": picture.data for picture in pictures}
        stored = [_stored(_position(name), f"{key}#{i}", data) for i, (name, data) in enumerate(held.items())]
        return StoredShard(stored, {key: sha256})


FORMATS: dict[str, type[ShardWriter]] = {"images": ImageFiles, "webdataset": WebDataset, "parquet": ParquetFiles}


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
    found: dict[str, bytes] = {}
    sums: dict[str, str] = {}
    for key, insides in wanted.items():
        try:
            data = store.get(key)
        except ObjectNotFound:
            continue
        if not insides[0]:
            found[key] = data
            continue
        sums[key] = hashlib.sha256(data).hexdigest()
        try:
            held = (_tar_members if key.endswith(".tar") else _parquet_rows)(data)
        except _DAMAGES:
            held = dict.fromkeys(insides, b"")
        found |= {f"{key}#{inside}": held[inside] for inside in insides if inside in held}
    return found, sums


def _write_once(
    store: Store, key: str, data: bytes, read: Callable[[bytes], dict[str, bytes]]
) -> tuple[dict[str, bytes] | None, str]:
    """Store the object unless one is there. None: it is stored as given; else what the one that is there holds.

    With it the sha256 of the object that is there.
    """
    if store.put_if_absent(key, data):
        return None, hashlib.sha256(data).hexdigest()
    there = store.get(key)
    try:
        return read(there), hashlib.sha256(there).hexdigest()
    except _DAMAGES:
        raise StorageError(f"{store.uri}/{key} is in the way and is no shard; remove it") from None


def _tar_members(data: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        files = [(member.name, archive.extractfile(member)) for member in archive if member.isfile()]
        return {name: file.read() for name, file in files if file is not None}


def _parquet_images(data: bytes) -> dict[str, bytes]:
    """The ``path`` of each image in a Parquet shard → its bytes, in the order of the rows."""
    column = pq.read_table(io.BytesIO(data), columns=["image"]).column("image").to_pylist()
    return {image["path"]: image["bytes"] for image in column}


def _parquet_rows(data: bytes) -> dict[str, bytes]:
    return {str(i): image for i, image in enumerate(_parquet_images(data).values())}


def _member(stem: str, position: int) -> str:
    return f"{stem}-{position:05d}"


def _position(name: str) -> int:
    """The place in its shard of the picture that :func:`_member` named."""
    return int(name.partition("-")[2].partition(".")[0])


def _slug(image_id: str) -> str:
    """A readable piece of a file name; what is unsafe there becomes an underscore."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", image_id)[:64]


def _stored(position: int, path: str, data: bytes) -> StoredPicture:
    return StoredPicture(position, path, len(data), hashlib.sha256(data).hexdigest())
