"""Encoded pictures and the three forms of a shard."""

from __future__ import annotations

import io
import json
import tarfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sdbatch.errors import StorageError
from sdbatch.outputs import (
    FORMATS,
    EncodedPicture,
    ShardWriter,
    StoredPicture,
    decode_metadata,
    encode,
    encode_metadata,
    read_pictures,
)
from sdbatch.spec import Picture
from sdbatch.storage import LocalStore

#: A job's fingerprint.
JOB = "cd" * 32


def row(position: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "image_id": f"id {position}/../x",
        "row_id": "r",
        "prompt": 'a réd <circle> & a "square"',
        "negative_prompt": "blur",
        "seed": 2**53 - 1,
        "width": 16,
        "height": 8,
        "num_inference_steps": 20,
        "guidance_scale": 4.5,
        "sampler": "dpmpp_2m",
        "init_image": None,
        "mask_image": "masks/1.png",
        "strength": 0.5,
        "truncated": False,
        "model": "builtin:shapes",
        "model_sha256": "ab" * 32,
        "status": "committed",
        "error": None,
        **changes,
    }


def pixels(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (8, 16, 3), dtype=np.uint8)


def picture(position: int) -> EncodedPicture:
    return EncodedPicture(position, row(position), encode(pixels(position), Picture(), row(position), JOB))


def write(writer: ShardWriter, stem: str, pictures: list[EncodedPicture]) -> list[StoredPicture]:
    """A shard of two batches, from the first picture to the whole."""
    batches = [pictures[:2], pictures[2:]]
    kept = [item for batch in batches for item in writer.keep(stem, batch, last=False)]
    stored = writer.finish(stem, kept).pictures
    writer.forget(stem)
    return stored


@pytest.mark.parametrize("form", FORMATS)
def test_finished_batches_outlive_their_writer(form: str, tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    writer = FORMATS[form](store, "png")
    batch = [picture(4), picture(5)]
    writer.keep("0000007", batch, last=False)
    assert FORMATS[form](store, "png").kept("0000007") == {item.position: item.data for item in batch}
    assert writer.kept("0000008") == {}
    other = [EncodedPicture(i, row(i), encode(pixels(99), Picture(), row(i), JOB)) for i in (4, 5)]
    assert writer.keep("0000007", other, last=False) == [
        EncodedPicture(i, row(i), item.data) for i, item in zip((4, 5), batch, strict=True)
    ]
    writer.finish("0000007", batch)
    writer.forget("0000007")
    assert list(store.list("_sdbatch/")) == []


def test_a_png_keeps_every_pixel() -> None:
    opened = Image.open(io.BytesIO(encode(pixels(), Picture(), row(), JOB)))
    assert np.array_equal(np.asarray(opened), pixels())


@pytest.mark.parametrize("form", FORMATS)
def test_what_a_shard_stores_is_read_back_by_its_paths(form: str, tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    pictures = [picture(position) for position in (0, 2, 3)]  # position 1 was quarantined
    stored = write(FORMATS[form](store, "png"), "0000012", pictures)
    assert [item.position for item in stored] == [0, 2, 3]
    read = read_pictures(store, [item.path for item in stored])
    assert [read[item.path] for item in stored] == [item.data for item in pictures]
    keys = [entry.key for entry in store.list()]
    assert all(key.startswith("data/0000012") and ".." not in key for key in keys)


def test_pictures_in_files_of_their_own_are_read_at_once(tmp_path: Path) -> None:
    together = threading.Barrier(16, timeout=30)

    class FarStore(LocalStore):
        def get(self, key: str) -> bytes:
            together.wait()
            return super().get(key)

    stored = write(FORMATS["images"](LocalStore(tmp_path), "png"), "0000000", [picture(i) for i in range(16)])
    assert len(read_pictures(FarStore(tmp_path), [one.path for one in stored])) == 16


@pytest.mark.parametrize("form", FORMATS)
def test_a_second_writer_changes_nothing_and_learns_what_is_stored(form: str, tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    writer = FORMATS[form](store, "png")
    first = write(writer, "0000000", [picture(0), picture(1)])
    other = [EncodedPicture(i, row(i), encode(pixels(99), Picture(), row(i), JOB)) for i in (0, 1)]
    assert write(writer, "0000000", other) == first


@pytest.mark.parametrize("form", FORMATS)
def test_a_picture_that_is_gone_or_damaged_is_not_made_up(form: str, tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    (stored,) = write(FORMATS[form](store, "png"), "0000000", [picture(0)])
    key = stored.path.partition("#")[0]
    store.delete(key)
    assert read_pictures(store, [stored.path]) == {}
    store.put(key, b"garbage")
    assert read_pictures(store, [stored.path])[stored.path] in {b"", b"garbage"}


def test_a_foreign_object_in_the_way_is_named(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("data/0000000.tar", b"garbage")
    with pytest.raises(StorageError, match=r"data/0000000\.tar is in the way"):
        write(FORMATS["webdataset"](store, "png"), "0000000", [picture(0)])


def test_a_webdataset_tar_groups_by_key_and_is_reproducible(tmp_path: Path) -> None:
    write(FORMATS["webdataset"](LocalStore(tmp_path / "a"), "png"), "0000003", [picture(0)])
    write(FORMATS["webdataset"](LocalStore(tmp_path / "b"), "png"), "0000003", [picture(0)])
    path = tmp_path / "a/data/0000003.tar"
    assert path.read_bytes() == (tmp_path / "b/data/0000003.tar").read_bytes()
    with tarfile.open(path) as archive:
        assert archive.getnames() == ["0000003-00000.png", "0000003-00000.json", "0000003-00000.txt"]
        described = archive.extractfile("0000003-00000.json")
        assert described is not None
        assert json.load(described)["seed"] == 2**53 - 1


def test_a_parquet_shard_embeds_bytes_beside_the_columns(tmp_path: Path) -> None:
    write(FORMATS["parquet"](LocalStore(tmp_path), "png"), "0000003", [picture(0)])
    (found,) = pq.read_table(tmp_path / "data/0000003.parquet").to_pylist()
    assert found["image"]["bytes"] == picture(0).data
    assert found["prompt"] == row()["prompt"]


def test_the_metadata_table_keeps_types_and_the_users_columns() -> None:
    full = {**row(), "shard": 1, "path": "p", "bytes": 3, "sha256": "x", "Category": "Animals"}
    (back,) = decode_metadata(encode_metadata([full], ["Category"]))
    assert back == full
