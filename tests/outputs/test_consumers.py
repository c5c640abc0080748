"""Outputs opened as they stand by the libraries that people open data sets with, which know nothing of sdbatch."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import webdataset
from datasets import Image, load_dataset
from PIL import Image as Pillow

from sdbatch.dataset import Card, card_text, write_job_card
from sdbatch.outputs import FORMATS, EncodedPicture
from sdbatch.storage import LocalStore
from tests.ledger.planned import Planned
from tests.outputs.test_outputs import picture, row

#: Of the twenty rows two can't be made, and one fails.
IDS = [f"{number:08d}-0" for number in range(20) if number not in {1, 3, 13}]


def output(folder: Path, form: str) -> Planned:
    """A job that is done, its card written."""
    planned = Planned(LocalStore(folder), form, slices=2)
    for number in range(8):
        planned.commit(number, failing=(1,) if number == 0 else ())
    assert write_job_card(planned.store, planned.job, planned.spec)
    return planned


@pytest.fixture(autouse=True)
def no_cache_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def loaded(folder: Path, tmp_path: Path, **options: Any) -> Any:
    return load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"), **options)


@pytest.mark.parametrize("form", ["images", "parquet"])
def test_datasets_opens_images_and_parquet_with_pictures_and_columns(form: str, tmp_path: Path) -> None:
    output(tmp_path / "out", form)
    found = loaded(tmp_path / "out", tmp_path)
    assert found.features["image"] == Image()
    assert sorted(found["image_id"]) == IDS
    for example in found:
        number = int(example["image_id"][:8])
        assert example["prompt"] == f"prompt {number % 10}"
        assert isinstance(example["image"], Pillow.Image)
        assert np.asarray(example["image"]).shape == (8, 8, 3)
    assert found.features["seed"].dtype == "int64"


def test_datasets_and_webdataset_open_tars(tmp_path: Path) -> None:
    output(tmp_path / "out", "webdataset")
    shards = sorted(str(path) for path in (tmp_path / "out/data").glob("*.tar"))
    pictures = list(webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8"))
    assert sorted(one["json"]["image_id"] for one in pictures) == IDS
    assert all(one["png"].shape == (8, 8, 3) and one["txt"] == one["json"]["prompt"] for one in pictures)
    found = loaded(tmp_path / "out", tmp_path)
    assert found.features["png"] == Image()
    assert found.features["json"]["init_image"].dtype == "string"  # of which no row has one
    assert sorted(example["image_id"] for example in found["json"]) == IDS
    assert all(example["png"].size == (8, 8) for example in found)


@pytest.mark.parametrize("form", FORMATS)
def test_pyarrow_opens_the_metadata_of_all_formats_and_reads_pictures_of_parquet(form: str, tmp_path: Path) -> None:
    output(tmp_path / "out", form)
    table = pyarrow.dataset.dataset(tmp_path / "out/metadata").to_table()
    assert len(table) == 20
    assert sorted(table.filter(pyarrow.dataset.field("status") == "committed").column("image_id").to_pylist()) == IDS
    if form == "parquet":
        data = pyarrow.dataset.dataset(tmp_path / "out/data").to_table(columns=["image", "image_id"])
        assert sorted(data.column("image_id").to_pylist()) == IDS
        with Pillow.open(io.BytesIO(data.column("image")[0].as_py()["bytes"])) as opened:
            assert opened.size == (8, 8)


def test_row_groups_of_parquet_are_small_enough_to_look_at_a_few_rows(tmp_path: Path) -> None:
    one = picture(0)
    several = [EncodedPicture(position, row(position), one.data) for position in range(230)]
    large = [EncodedPicture(position, row(position), bytes(12 << 20)) for position in range(4)]
    for stem, pictures in (("0000000", several), ("0000001", large)):
        FORMATS["parquet"](LocalStore(tmp_path), "png").finish(stem, pictures)
    rows = [
        [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        for file in (pq.ParquetFile(tmp_path / f"data/{stem}.parquet") for stem in ("0000000", "0000001"))
    ]
    assert rows == [[100, 100, 30], [2, 2]]


def test_a_column_of_the_user_is_no_name_of_a_file(tmp_path: Path) -> None:
    """Readers of image folders open what a column ``…_file_name`` names."""
    named = EncodedPicture(0, row(0, old_file_name="../../etc/passwd", category="a"), picture(0).data)
    FORMATS["images"](LocalStore(tmp_path), "png").finish("0000000", [named])
    names = pq.read_schema(tmp_path / "data/0000000/metadata.parquet").names
    assert "category" in names
    assert [name for name in names if "file_name" in name] == ["file_name"]


def test_the_card_tells_what_is_there(tmp_path: Path) -> None:
    planned = output(tmp_path / "out", "images")
    card = planned.store.get("README.md").decode()
    for told in ("| pictures | 17 |", "| requests that could not be made | 3 |", "license: unknown", "n<1K", "f" * 64):
        assert told in card
    schema = pq.read_schema(tmp_path / "out/metadata/0000000.parquet")
    assert all(f"| `{name}` | " in card for name in schema.names)
    assert "measured on" not in card  # every column of ours has a meaning


def test_names_of_strangers_are_no_markup_in_the_card() -> None:
    columns = pa.schema([("a|b", pa.string()), ("`<script>`\n# x", pa.string())])
    card = Card("n", None, "images", "png", 1, 1, "models/`x`|y", "f" * 64, columns, tuple(columns.names), {})
    text = card_text(card)
    assert r"| `a\|b` | string | carried over from the prompt table |" in text
    assert "| `'<script>' # x` | string |" in text
    assert r"drawn by the text-to-image model `models/'x'\|y`." in text


def test_a_card_that_somebody_changed_stays_and_ours_is_renewed(tmp_path: Path) -> None:
    planned = output(tmp_path / "out", "images")
    licensed = planned.spec.model_copy(
        update={"output": planned.spec.output.model_copy(update={"license": "cc-by-4.0"})}
    )
    assert write_job_card(planned.store, planned.job, licensed)
    renewed = planned.store.get("README.md")
    assert b"license: cc-by-4.0" in renewed
    theirs = renewed.replace(b"synthetic pictures", b"lovely pictures")
    planned.store.put("README.md", theirs)
    assert not write_job_card(planned.store, planned.job, planned.spec)
    assert planned.store.get("README.md") == theirs
    planned.store.delete("README.md")
    planned.store.put("README.md/notes.txt", b"a folder of theirs")
    assert not write_job_card(planned.store, planned.job, planned.spec)
