"""Pictures as files, one folder a shard, with a table beside them that data set libraries read."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import asdict, replace

import pyarrow as pa
import pyarrow.parquet as pq

from sdbatch.outputs.metadata import CheckColumns, description, description_fields
from sdbatch.outputs.shards import EncodedPicture, ShardWriter, StoredPicture, StoredShard, stored, write_once
from sdbatch.storage import at_once
from sdbatch.storage.parquet import read_parquet

#: Columns whose names tell a reader of image folders to open what they name.
_OPENED = ("file_name", "file_names")


class ImageFiles(ShardWriter):
    """One object a picture, ``data/SHARD/POSITION-ID.png``, and ``data/SHARD/metadata.parquet``: file names and what
    they show, as readers of image folders expect it."""

    def kept(self, stem: str) -> dict[int, bytes]:
        ours = re.compile(rf"{self.root}/{stem}/\d{{5,}}-[^/]*\.{self.ending}")
        keys = [entry.key for entry in self.store.list(f"{self.root}/{stem}/") if ours.fullmatch(entry.key)]
        return {
            int(key.rpartition("/")[2].partition("-")[0]): data
            for key, data in zip(keys, at_once(self.store.get, keys), strict=True)
        }

    def keep(self, stem: str, batch: Sequence[EncodedPicture], *, last: bool) -> list[EncodedPicture]:
        def put(picture: EncodedPicture) -> EncodedPicture:
            key = self._key(stem, picture)
            is_stored = self.store.put_if_absent(key, picture.data)
            return picture if is_stored else replace(picture, data=self.store.get(key))

        return list(at_once(put, batch))

    def carry_over(self, stem: str, pictures: Sequence[EncodedPicture]) -> None:
        self.keep(stem, pictures, last=False)

    def finish(self, stem: str, pictures: Sequence[EncodedPicture]) -> StoredShard:
        held = [stored(picture.position, self._key(stem, picture), picture.data) for picture in pictures]
        folder = f"{self.root}/{stem}"
        standing, sha256 = write_once(
            self.store,
            f"{folder}/metadata.parquet",
            _folder_table(pictures, held, self.checked),
            lambda data: _named(folder, data),
        )
        return StoredShard(held if standing is None else standing, {f"{folder}/metadata.parquet": sha256})

    def forget(self, stem: str) -> None:
        pass

    def _key(self, stem: str, picture: EncodedPicture) -> str:
        return f"{self.root}/{stem}/{picture.position:05d}-{_slug(picture.row['image_id'])}.{self.ending}"


def _folder_table(pictures: Sequence[EncodedPicture], held: Sequence[StoredPicture], checked: CheckColumns) -> bytes:
    """The table of a folder: ``file_name``, what describes each picture, its size and checksum."""
    fields = [
        (name, kind)
        for name, kind in description_fields(pictures[0].row, checked)
        if not name.endswith(tuple(f"_{opened}" for opened in _OPENED)) and name not in _OPENED
    ]
    schema = pa.schema([("file_name", pa.string()), *fields, ("bytes", pa.int64()), ("sha256", pa.string())])
    rows = [
        {**description(picture.row), **asdict(one), "file_name": one.path.rpartition("/")[2]}
        for picture, one in zip(pictures, held, strict=True)
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer, compression="zstd")
    return buffer.getvalue()


def _named(folder: str, data: bytes) -> list[StoredPicture]:
    """The pictures that a folder's table names."""
    rows = read_parquet(data, ["file_name", "bytes", "sha256"]).to_pylist()
    return [
        StoredPicture(
            int(row["file_name"].partition("-")[0]), f"{folder}/{row['file_name']}", row["bytes"], row["sha256"]
        )
        for row in rows
    ]


def _slug(image_id: str) -> str:
    """A readable piece of a file name; what is unsafe there becomes an underscore."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", image_id)[:64]
