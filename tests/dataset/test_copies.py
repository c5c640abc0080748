"""What goes along with exported pictures: renditions, thumbnails and signatures."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdbatch import cli
from sdbatch.dataset import Manifest
from sdbatch.engine.making.shards import ShardCommitter
from sdbatch.errors import OutputError, StorageError, UsageError
from sdbatch.outputs import FORMATS, Signer
from sdbatch.spec import Picture
from sdbatch.storage import LocalStore, Store
from tests.dataset.test_export import Breaking, exported, mended, stored, verdict
from tests.ledger.planned import Planned
from tests.outputs.test_consumers import loaded, no_cache_of_the_user  # noqa: F401
from tests.outputs.test_credentials import credentials, read
from tests.outputs.test_renditions import ASKED

WEBP = Picture(type="webp", lossless=True)


def job(folder: Path, form: str = "images", **output: Any) -> Planned:
    """A job that is done, with renditions and thumbnails."""
    planned = Planned(LocalStore(folder), form, slices=2, **{**ASKED, **output})
    for number in range(8):
        planned.commit(number)
    return planned


def copies(store: Store) -> dict[str, bytes]:
    return {
        entry.key: store.get(entry.key)
        for root in ("renditions/", "thumbnails/")
        for entry in store.list(root)
        if not entry.key.endswith("metadata.parquet")
    }


def test_renditions_come_along_when_they_are_asked_for(tmp_path: Path) -> None:
    source, target, without = (LocalStore(tmp_path / name) for name in ("out", "to", "without"))
    job(tmp_path / "out")
    assert exported(source, without).left_behind == ["renditions/square", "renditions/story", "thumbnails"]
    assert copies(without) == {}
    assert exported(source, target, renditions=True).left_behind == []
    assert copies(target) == copies(source)
    assert len(copies(target)) == 3 * 18
    assert verdict(target).ok
    with pytest.raises(OutputError, match=r"holds another export \(renditions: False there, True here\)"):
        exported(source, without, renditions=True)
    Planned(LocalStore(tmp_path / "plain")).commit(0)
    with pytest.raises(UsageError, match="--renditions: the job has neither renditions nor thumbnails; leave it out"):
        exported(LocalStore(tmp_path / "plain"), LocalStore(tmp_path / "none"), renditions=True)


@pytest.mark.parametrize("form", FORMATS)
def test_renditions_of_chosen_pictures_open_in_the_form_and_type_of_the_export(form: str, tmp_path: Path) -> None:
    source, target = job(tmp_path / "out", "webdataset").store, LocalStore(tmp_path / "to")
    exported(source, target, form, image=WEBP, where="shard > 3", renditions=True)
    for name, size in (("default", (8, 8)), ("square", (6, 6)), ("thumbnails", (8, 8))):
        found = loaded(tmp_path / "to", tmp_path, name=name)
        assert len(found) == 9
        assert {example["webp" if form == "webdataset" else "image"].size for example in found} == {size}
    assert verdict(target).ok


@pytest.mark.parametrize("form", FORMATS)
def test_a_stopped_export_of_renditions_goes_on_to_the_same_bytes(form: str, tmp_path: Path) -> None:
    source, whole = job(tmp_path / "out").store, LocalStore(tmp_path / "whole")
    exported(source, whole, form, renditions=True)
    for puts in (2, 11, 30):
        with pytest.raises(StorageError, match="the disk is full"):
            exported(source, Breaking(tmp_path / f"to{puts}", puts), form, renditions=True)
        target = LocalStore(tmp_path / f"to{puts}")
        exported(source, target, form, renditions=True)
        assert stored(target) == stored(whole)
        assert verdict(target).ok


def test_exported_renditions_are_proved_and_those_of_mended_shards_go(tmp_path: Path) -> None:
    planned, target = job(tmp_path / "out"), LocalStore(tmp_path / "to")
    exported(planned.store, target, "webdataset", renditions=True)
    mended(planned, colour=90)
    exported(planned.store, target, "webdataset", renditions=True)
    found = verdict(target)
    assert (found.ok, found.leftover, found.extra) == (True, [], [])
    assert target.exists("thumbnails/0000004r2.tar")
    target.put("renditions/square/0000001r9.tar", b"x")
    target.put("thumbnails/notes.txt", b"x")
    target.put("renditions/story/0000002.tar", target.get("renditions/story/0000002.tar").replace(b"prompt", b"tpmorp"))
    target.delete("thumbnails/0000005.tar")
    found = verdict(target)
    assert (found.leftover, found.extra) == (["renditions/square/0000001r9.tar"], ["thumbnails/notes.txt"])
    assert (found.altered, found.missing) == (["renditions/story/0000002.tar"], ["thumbnails/0000005.tar"])


def test_exports_that_take_nothing_along_are_told_as_before() -> None:
    """Their records carry this checksum: those that were begun before go on."""
    manifest = Manifest("t", "f" * 64, "images", None, None)
    assert list(manifest.content()) == ["name", "fingerprint", "format", "image", "where"]
    assert manifest.sha256 == "2428031a00de38ff8bc0a12ddc91329efba59399babaa7162d7a66df3e2fb33a"


@pytest.fixture
def signed(tmp_path: Path) -> Planned:
    """One shard of a job that signs."""
    c2pa = credentials(tmp_path)
    planned = Planned(LocalStore(tmp_path / "out"), thumbnail=16, c2pa=c2pa.model_dump())
    planned.committer = ShardCommitter(planned.store, planned.spec, planned.job, {}, Signer(c2pa, "1"))
    planned.commit(0)
    return planned


def states(store: LocalStore, ending: str) -> set[str]:
    found = [path.read_bytes() for path in store.root.rglob(f"*.{ending}")]
    return {str(read(data, ending)["validation_state"]) if b"c2pa" in data else "unsigned" for data in found}


def test_what_is_encoded_anew_is_signed_anew_where_the_key_is_at_hand(signed: Planned, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="the disk is full"):
        exported(signed.store, Breaking(tmp_path / "to", 3), image=Picture(type="jpeg"), renditions=True)
    target = LocalStore(tmp_path / "to")
    assert exported(signed.store, target, image=Picture(type="jpeg"), renditions=True).unsigned is None
    assert (states(target, "jpeg"), states(target, "webp")) == ({"Valid"}, {"Valid"})
    assert {Image.open(io.BytesIO(data)).format for data in copies(target).values()} == {"WEBP"}
    assert verdict(target).ok
    (tmp_path / "key.pem").unlink()
    with pytest.raises(OutputError, match=r"TARGET: .*to holds an export that is signed, and output\.c2pa\.key: .*key"):
        exported(signed.store, target, image=Picture(type="jpeg"), renditions=True)


def test_signatures_that_are_left_out_are_told(
    signed: Planned, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, target = (tmp_path / "key.pem").read_bytes(), LocalStore(tmp_path / "to")
    (tmp_path / "key.pem").unlink()
    command = ["export", signed.store.uri, target.uri, "--image", "webp", "--renditions"]
    assert cli.call(command) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "what is encoded anew has no signatures, as the job's own has: output.c2pa.key: " in told
    assert states(target, "webp") == {"unsigned"}
    (tmp_path / "key.pem").write_bytes(key)
    assert cli.call([*command, "--json"]) == 0  # as it was begun
    assert "to have them, export to an empty place" in json.loads(capsys.readouterr().out)["unsigned"]
    assert cli.call(["export", signed.store.uri, str(tmp_path / "as-it-is")]) == 0
    told = capsys.readouterr().err
    assert "thumbnails stay behind; with --renditions" in told
    assert "no signatures" not in told  # these bytes are the job's own
