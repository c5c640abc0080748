"""Shards of one object: WebDataset tars and Parquet files that hold the pictures."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq

from sdbatch.outputs.features import with_features
from sdbatch.outputs.metadata import description, description_fields
from sdbatch.outputs.shards import EncodedPicture, ShardWriter, StoredShard, stored, write_once
from sdbatch.storage.parquet import read_parquet

#: A viewer reads whole row groups to show some rows: at most so many rows, and bytes of pictures.
_GROUP_ROWS, _GROUP_BYTES = 100, 32 << 20
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


class _Container(ShardWriter):
    """One object a shard; its batches wait for it in small tars."""

    def kept(self, stem: str) -> dict[int, bytes]:
        found: dict[int, bytes] = {}
        for entry in self.store.list(f"_sdbatch/batches/{stem}/"):
            members = tar_members(self.store.get(entry.key))
            found |= {_position(name): data for name, data in members.items() if name.endswith(f".{self.ending}")}
        return found

    def keep(self, stem: str, batch: Sequence[EncodedPicture], *, last: bool) -> list[EncodedPicture]:
        if last or not batch:
            return list(batch)
        key = f"_sdbatch/batches/{stem}/{batch[0].position:05d}.tar"
        held, _ = write_once(self.store, key, self._tar(stem, batch), tar_members)
        if held is None:
            return list(batch)
        standing = {_position(name): data for name, data in held.items() if name.endswith(f".{self.ending}")}
        return [replace(picture, data=standing.get(picture.position, picture.data)) for picture in batch]

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
        key = f"{self.root}/{stem}.tar"
        held, sha256 = write_once(self.store, key, self._tar(stem, pictures), tar_members)
        if held is None:
            held = {f"{_member(stem, picture.position)}.{self.ending}": picture.data for picture in pictures}
        found = [
            stored(_position(name), f"{key}#{name}", data)
            for name, data in held.items()
            if name.endswith(f".{self.ending}")
        ]
        return StoredShard(found, {key: sha256})


class ParquetFiles(_Container):
    """One Parquet file a shard, ``data/SHARD.parquet``: the picture's bytes in ``image``, then the metadata columns.

    The file says in its own key-value metadata that ``image`` holds pictures, in the words of Hugging Face data sets.
    """

    def finish(self, stem: str, pictures: Sequence[EncodedPicture]) -> StoredShard:
        key = f"{self.root}/{stem}.parquet"
        rows = [
            {
                "image": {"bytes": picture.data, "path": f"{_member(stem, picture.position)}.{self.ending}"},
                **description(picture.row),
            }
            for picture in pictures
        ]
        schema = with_features(
            pa.schema([("image", IMAGE), *description_fields(pictures[0].row, self.checked)]), images=["image"]
        )
        # Pictures are compressed already.
        compression = dict.fromkeys(schema.names, "zstd") | {"image.bytes": "none", "image.path": "zstd"}
        mean = sum(len(picture.data) for picture in pictures) // len(pictures)
        buffer = io.BytesIO()
        pq.write_table(
            pa.Table.from_pylist(rows, schema=schema),
            buffer,
            compression=compression,
            row_group_size=max(min(_GROUP_ROWS, _GROUP_BYTES // max(mean, 1)), 1),
            write_page_index=True,
        )
        held, sha256 = write_once(self.store, key, buffer.getvalue(), _parquet_images)
        if held is None:
            held = {f"{_member(stem, picture.position)}.{self.ending}": picture.data for picture in pictures}
        found = [stored(_position(name), f"{key}#{i}", data) for i, (name, data) in enumerate(held.items())]
        return StoredShard(found, {key: sha256})


def tar_members(data: bytes) -> dict[str, bytes]:
    """Name → bytes of a tar's files."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        files = [(member.name, archive.extractfile(member)) for member in archive if member.isfile()]
        return {name: file.read() for name, file in files if file is not None}


def _parquet_images(data: bytes) -> dict[str, bytes]:
    """The ``path`` of each image in a Parquet shard → its bytes, in the order of the rows."""
    column = read_parquet(data, ["image"]).column("image").to_pylist()
    return {image["path"]: image["bytes"] for image in column}


def parquet_rows(data: bytes) -> dict[str, bytes]:
    """A row's number → the bytes of its image."""
    return {str(i): image for i, image in enumerate(_parquet_images(data).values())}


def _member(stem: str, position: int) -> str:
    return f"{stem}-{position:05d}"


def _position(name: str) -> int:
    """The place in its shard of the picture that :func:`_member` named."""
    return int(name.partition("-")[2].partition(".")[0])
