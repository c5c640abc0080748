"""Exports: the same pictures in another form, whole or chosen, gone on with where they were stopped."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset
import pytest
from PIL import Image

from sdbatch import cli
from sdbatch.dataset import Exported, Where, export, read_manifest, verify_export
from sdbatch.errors import OutputError, StorageError, UsageError
from sdbatch.ledger import Again, Part, Round, Shards, Verdict, put_round, write_job
from sdbatch.outputs import FORMATS, encode, opens, pixels_sum, read_pictures, read_stored
from sdbatch.spec import Picture
from sdbatch.storage import LocalStore, Store
from tests.ledger.planned import Planned
from tests.outputs.test_consumers import IDS, loaded, no_cache_of_the_user, output  # noqa: F401


def exported(source: Store, target: Store, form: str | None = None, **options: Any) -> Exported:
    given: dict[str, Any] = {"image": None, "where": None, "renditions": False, **options}
    return export(source, target, form, progress=lambda done, total: None, **given)


def verdict(target: Store) -> Verdict:
    manifest = read_manifest(target)
    assert manifest is not None
    return verify_export(target, manifest, read_stored, opens, lambda done, total: None)


def pictures(store: LocalStore) -> dict[str, bytes]:
    """Image id → bytes of all that are committed."""
    rows = pyarrow.dataset.dataset(store.root / "metadata").to_table().to_pylist()
    paths = {row["image_id"]: row["path"] for row in rows if row["status"] == "committed"}
    data = read_pictures(store, paths.values())
    return {name: data[path] for name, path in paths.items()}


def stored(store: LocalStore) -> dict[str, bytes]:
    """Everything of a data set: not the records, which tell times."""
    return {entry.key: store.get(entry.key) for entry in store.list() if not entry.key.startswith("_sdbatch/")}


@pytest.mark.parametrize(
    ("form", "to"), [("images", "webdataset"), ("webdataset", "parquet"), ("parquet", "images"), ("images", "images")]
)
def test_an_export_has_the_same_pictures_and_opens_as_it_stands(form: str, to: str, tmp_path: Path) -> None:
    source, target = output(tmp_path / "out", form).store, LocalStore(tmp_path / "to")
    assert isinstance(source, LocalStore)
    ended = exported(source, target, to)
    assert (ended.images, ended.left_out, ended.unmade) == (17, 0, 0)
    assert pictures(target) == pictures(source)
    found = verdict(target)
    assert (found.ok, found.committed, found.extra) == (True, 17, [])
    data = loaded(tmp_path / "to", tmp_path)
    assert sorted(data["json"]["image_id"] if to == "webdataset" else data["image_id"]) == IDS
    assert f"| exported from | `{source.uri}` |" in target.get("README.md").decode()


def test_pictures_are_encoded_anew_with_what_made_them_inside(tmp_path: Path) -> None:
    source, target = output(tmp_path / "out", "parquet").store, LocalStore(tmp_path / "to")
    assert isinstance(source, LocalStore)
    exported(source, target, "images", image=Picture(type="webp", lossless=True))
    before, after = pictures(source), pictures(target)
    assert before.keys() == after.keys()
    for name, data in after.items():
        assert pixels_sum(data) == pixels_sum(before[name])
        assert data[8:12] == b"WEBP"
        assert name.encode() in data
    small = LocalStore(tmp_path / "small")
    exported(source, small, image=Picture(type="jpeg", quality=20))
    assert {Image.open(io.BytesIO(data)).format for data in pictures(small).values()} == {"JPEG"}
    assert verdict(small).ok


def test_a_condition_chooses_pictures_and_the_card_tells_it(tmp_path: Path) -> None:
    source, target = output(tmp_path / "out", "images").store, LocalStore(tmp_path / "to")
    ended = exported(source, target, "parquet", where="prompt in ['prompt 2', 'prompt 4'] and shard > 0")
    assert (ended.images, ended.left_out) == (2, 15)
    assert sorted(pictures(target)) == ["00000012-0", "00000014-0"]
    assert verdict(target).ok
    assert "| chosen by | `prompt in ['prompt 2', 'prompt 4'] and shard > 0` |" in target.get("README.md").decode()
    piped = LocalStore(tmp_path / "piped")
    exported(source, piped, where="prompt in ['a|b',\n'`c`'] or shard < 9")
    assert r"| chosen by | `prompt in ['a\|b', ''c''] or shard < 9` |" in piped.get("README.md").decode()
    nothing = LocalStore(tmp_path / "nothing")
    assert exported(source, nothing, where="shard < 0").images == 0
    assert verdict(nothing).ok


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("score > 0.3", ["high"]),
        ("not score > 0.3", ["low", "none", "word"]),
        ("score <= 0.3 or category == 'cat'", ["low", "none"]),
        ("category != 'cat'", ["high", "low"]),
        ("category in ('cat', 'dog') and score >= 0", ["high"]),
        ("category not in ['dog']", ["low", "none"]),
        ("seed == 2", ["low"]),
        ("seed > 'a'", []),
        ("made == True", ["high"]),
        ("score > -1", ["high", "low"]),
    ],
)
def test_conditions_mean_what_they_say(text: str, rows: list[str]) -> None:
    table: dict[str, dict[str, Any]] = {
        "high": {"score": "0.4", "category": "dog", "seed": 1, "made": True},
        "low": {"score": "0.2", "category": "hen", "seed": 2, "made": False},
        "none": {"score": None, "category": "cat", "seed": None, "made": None},
        "word": {"score": "much", "category": None, "seed": 3, "made": False},
    }
    assert [name for name, row in table.items() if Where(text)(row)] == rows


@pytest.mark.parametrize(
    "text",
    [
        "",
        "score >",
        "score",
        "1 < score < 2",
        "__import__('os').system('true')",
        "score > other",
        "score in 3",
        "score == [1]",
        "lambda: 1",
        "(" * 500 + "a" + ")" * 500,
        "a == " + "1" * 3000,
        "score is None",
        "score in {[1]}",
        "score == " + "-" * 1900 + "1",
        "score" + ".a" * 990,
        "score == " + "+".join(["1"] * 900),
    ],
)
def test_what_is_no_condition_is_refused_and_never_run(text: str) -> None:
    with pytest.raises(UsageError, match="--where: "):
        Where(text)


def test_a_column_that_is_not_there_is_told_before_anything_is_stored(tmp_path: Path) -> None:
    source, target = output(tmp_path / "out", "images").store, LocalStore(tmp_path / "to")
    with pytest.raises(UsageError, match="there is no column 'clip'; there is: image_id, "):
        exported(source, target, where="clip > 1")
    assert list(target.list()) == []


class Breaking(LocalStore):
    """A store that fails for good after so many puts."""

    def __init__(self, root: Path, puts: int) -> None:
        super().__init__(root)
        self.left = puts

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self.left -= 1
        if self.left < 0:
            raise StorageError("the disk is full")
        return super().put_if_absent(key, data)


@pytest.mark.parametrize("form", FORMATS)
def test_a_stopped_export_goes_on_to_the_same_bytes(form: str, tmp_path: Path) -> None:
    source, whole = output(tmp_path / "out", "images").store, LocalStore(tmp_path / "whole")
    exported(source, whole, form)
    for puts in (0, 1, 4, 9, 16):
        folder = tmp_path / f"to{puts}"
        with pytest.raises(StorageError, match="the disk is full"):
            exported(source, Breaking(folder, puts), form)
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
        target = LocalStore(folder)
        assert exported(source, target, form).images == 17
        assert all(path.stat().st_mtime_ns == at for path, at in before.items())  # nothing is written twice
        assert stored(target) == stored(whole)
        assert verdict(target).ok


def test_a_target_that_holds_anything_else_is_refused(tmp_path: Path) -> None:
    planned, target = output(tmp_path / "out", "images"), LocalStore(tmp_path / "to")
    exported(planned.store, target, "parquet")
    with pytest.raises(OutputError, match=r"holds another export \(format: parquet there, webdataset here\)"):
        exported(planned.store, target, "webdataset")
    with pytest.raises(OutputError, match="is a job's output; export to an empty place"):
        exported(planned.store, planned.store, "images")
    foreign = LocalStore(tmp_path / "foreign")
    foreign.put("data/mine.png", b"x")
    with pytest.raises(OutputError, match=r"holds data/mine\.png but no export"):
        exported(planned.store, foreign)
    empty = Planned(LocalStore(tmp_path / "empty"))
    with pytest.raises(UsageError, match="nothing of this job is made yet"):
        exported(empty.store, LocalStore(tmp_path / "none"))


def mended(planned: Planned, colour: int) -> None:
    """Shard 4 in a second edition, its first picture made anew."""
    put_round(planned.store, Round(2, "retry", (), {4: Again(1, 1, (0,))}))
    shard, committer = replace(planned.shards[4], edition=2), planned.a_committer()
    settled = committer.carried_over(shard)
    made = planned.ended(shard, colour=colour)[0]
    kept = committer.writer.keep(shard.stem, [made.picture] if made.picture else [], last=False)
    settled[0] = replace(made, picture=kept[0])
    committer.commit(shard, [end for _, end in sorted(settled.items())], {}, "w")


def test_what_the_job_has_made_or_mended_since_is_exported_too(tmp_path: Path) -> None:
    planned, target = Planned(LocalStore(tmp_path / "out"), "images", slices=2), LocalStore(tmp_path / "to")
    for number in range(6):
        planned.commit(number)
    assert exported(planned.store, target, "parquet").unmade == 2
    for number in (6, 7):
        planned.commit(number)
    mended(planned, colour=90)
    ended = exported(planned.store, target, "parquet")
    assert (ended.images, ended.left_out, ended.unmade) == (18, 0, 0)
    assert isinstance(planned.store, LocalStore)
    assert pictures(target) == pictures(planned.store)
    found = verdict(target)
    assert (found.ok, found.leftover, found.extra) == (True, [], [])
    assert not target.exists("data/0000004.parquet")


def test_a_mended_shard_is_there_once_also_if_the_export_was_stopped_before_the_old_one_went(tmp_path: Path) -> None:
    planned, target = Planned(LocalStore(tmp_path / "out"), "images", slices=2), LocalStore(tmp_path / "to")
    for number in range(8):
        planned.commit(number)
    exported(planned.store, target, "parquet")
    mended(planned, colour=90)

    def broken(store: LocalStore, key: str) -> None:
        raise StorageError("the network is gone")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalStore, "delete", broken)
        with pytest.raises(StorageError, match="the network is gone"):
            exported(planned.store, target, "parquet")
    assert verdict(target).leftover == ["data/0000004.parquet", "metadata/0000004.parquet"]
    exported(planned.store, target, "parquet")
    assert (verdict(target).ok, verdict(target).leftover) == (True, [])


def test_a_picture_that_does_not_fit_into_the_type_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = output(tmp_path / "out", "images").store

    def too_long(*given: Any) -> bytes:
        raise ValueError("XMP data is too long")  # as Pillow does for more than 64 KiB in a JPEG

    monkeypatch.setattr(sys.modules["sdbatch.dataset.exporter"], "encode", too_long)
    with pytest.raises(
        UsageError, match=r"--image: 0000000\d-0 can't be encoded as jpeg: XMP data is too long; choose"
    ):
        exported(source, LocalStore(tmp_path / "to"), image=Picture(type="jpeg"))


def test_what_an_extension_has_planned_goes_to_the_same_place(tmp_path: Path) -> None:
    planned, target = output(tmp_path / "out", "images"), LocalStore(tmp_path / "to")
    exported(planned.store, target, "parquet")
    parts = (*planned.job.parts, Part("e" * 64, 0, 0, 0, 0, 0))
    assert write_job(planned.store, replace(planned.job, parts=parts), Shards.of([])).fingerprint == "e" * 64
    assert exported(planned.store, target, "parquet").images == 17
    assert f"| fingerprint | `{'e' * 64}` |" in target.get("README.md").decode()


def test_pictures_of_several_types_are_encoded_anew_or_not_exported(tmp_path: Path) -> None:
    """A retry may have made some of them otherwise."""
    planned = Planned(LocalStore(tmp_path / "out"), "webdataset")
    shard, made = planned.shards[0], planned.ended(planned.shards[0])
    pixels = np.zeros((8, 8, 3), np.uint8)
    other = [
        replace(end, picture=replace(end.picture, data=encode(pixels, Picture(type="jpeg"), end.row, "x")))
        for end in made
        if end.picture is not None
    ]
    planned.committer.commit(shard, other, {}, "w")
    with pytest.raises(UsageError, match="is no png, as others of this job are; say by --image what all shall be"):
        exported(planned.store, LocalStore(tmp_path / "to"))
    assert exported(planned.store, LocalStore(tmp_path / "anew"), image=Picture()).images == 4


def test_damage_is_told_on_both_sides(tmp_path: Path) -> None:
    planned, target = output(tmp_path / "out", "images"), LocalStore(tmp_path / "to")
    exported(planned.store, target, "webdataset")
    tar = target.get("data/0000001.tar")
    target.put("data/0000001.tar", tar.replace(b"prompt 5", b"prompt 6"))
    target.delete("metadata/0000000.parquet")
    target.put("data/0000002r7.tar", b"x")
    target.put("data/notes.txt", b"x")
    found = verdict(target)
    assert not found.ok
    assert found.altered == ["metadata/0000000.parquet", "00000005-0"]
    assert (found.leftover[-1], found.extra) == ("data/0000002r7.tar", ["data/notes.txt"])
    key = next(entry.key for entry in planned.store.list("data/0000004") if entry.key.endswith(".png"))
    planned.store.put(key, planned.store.get(key)[:-20])
    with pytest.raises(StorageError, match=rf"{key} was altered; 'sdbatch verify' tells .* 'sdbatch repair' mends it"):
        exported(planned.store, LocalStore(tmp_path / "again"))


@pytest.fixture
def done(tmp_path: Path) -> str:
    return output(tmp_path / "out", "images").store.uri


def test_the_command_exports_and_verify_proves_it(
    done: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", done, str(tmp_path / "to"), "--format", "parquet", "--image", "jpeg", "--where", "seed >= 0"]
    assert cli.call([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["images"], told["left_out"], told["unmade"]) == (17, 0, 0)
    assert cli.call(["verify", str(tmp_path / "to")]) == 0
    assert "17 of 17 exported pictures are there" in capsys.readouterr().err
    assert cli.call(["verify", str(tmp_path / "to"), "--recompute", "1"]) == 2
    assert np.asarray(loaded(tmp_path / "to", tmp_path)[0]["image"]).shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--quality", "3"], "give --image, too"),
        (["--image", "jpeg", "--lossless"], "jpeg has no such form"),
        (["--image", "png", "--quality", "3"], "there is none to choose"),
        (["--where", "clip >"], "can't be read; write a condition such as"),
        (["--format", "zip"], "zip"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_any_work(
    options: list[str], told: str, done: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.call(["export", done, str(tmp_path / "to"), *options]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "to").exists()
