"""Renditions and thumbnails: what they show, that they are proved and mended as pictures are."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdbatch.dataset import write_job_card
from sdbatch.ledger import Again, Round, put_round
from sdbatch.outputs import FORMATS, EncodedPicture, copies, encode, misfits
from sdbatch.outputs.containers import tar_members
from sdbatch.outputs.renditions import framed
from sdbatch.spec import Output, Picture, Rendition, parse_spec
from sdbatch.storage import LocalStore
from tests.ledger.planned import Planned
from tests.outputs.test_consumers import IDS, loaded, no_cache_of_the_user  # noqa: F401
from tests.outputs.test_outputs import JOB, row
from tests.test_spec import SMALLEST, problems

ASKED: dict[str, Any] = {
    "renditions": {"square": {"size": "6x6"}, "story": {"aspect": "9:16", "fit": "pad", "background": "#ff0000"}},
    "thumbnail": 16,
}


def drawn(width: int, height: int) -> Image.Image:
    """Green to the left, blue to the right, with noise that no scaling keeps."""
    pixels = np.random.default_rng(0).integers(0, 99, (height, width, 3), dtype=np.uint8)
    pixels[:, : width // 2, 1] = 200
    pixels[:, width // 2 :, 2] = 200
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("asked", "size"),
    [
        ({"size": "64x32"}, (64, 32)),
        ({"size": "64x32", "fit": "pad"}, (64, 32)),
        ({"aspect": "1:1"}, (60, 60)),
        ({"aspect": "4:5"}, (48, 60)),
        ({"aspect": "16:9"}, (90, 51)),
        ({"aspect": "9:16", "fit": "pad"}, (90, 160)),
        ({"aspect": "1.91:1", "fit": "pad"}, (115, 60)),
    ],
)
def test_every_frame_has_the_size_that_was_asked_for(asked: dict[str, str], size: tuple[int, int]) -> None:
    assert framed(drawn(90, 60), Rendition(**asked)).size == size


def test_crop_fills_the_frame_and_pad_shows_all_of_the_picture() -> None:
    picture = drawn(90, 60)
    cropped = np.asarray(framed(picture, Rendition(aspect="1:1")))
    assert np.array_equal(cropped, np.asarray(picture)[:, 15:75])  # pixels as they are, from the middle
    padded = np.asarray(framed(picture, Rendition(aspect="1:1", fit="pad", background="#102030")))
    assert np.array_equal(padded[15:75], np.asarray(picture))
    assert (padded[:15] == (0x10, 0x20, 0x30)).all()
    assert (padded[75:] == (0x10, 0x20, 0x30)).all()
    scaled = np.asarray(framed(picture, Rendition(size="30x30", fit="pad", background="#ffffff")))
    assert (scaled[0] == 255).all()
    assert (scaled[15, 2, 1], scaled[15, 27, 2]) > (120, 120)  # left and right are both there


def test_a_copy_is_reproducible_and_says_how_it_was_made() -> None:
    data = encode(np.asarray(drawn(90, 60)), Picture(), row(), JOB)
    output = Output(uri="out", image=Picture(type="webp", lossless=True), **ASKED)
    for several in copies(output):
        made = several.copy(EncodedPicture(3, row(), data), JOB)
        assert made == several.copy(EncodedPicture(3, row(), data), JOB)
        assert b"trainedAlgorithmicMedia" in made.data
        opened = Image.open(io.BytesIO(made.data))
        assert (made.row["width"], made.row["height"]) == opened.size
        assert opened.format == "WEBP"
    assert max(opened.size) == 16  # the thumbnail, of 90 pixels


@pytest.mark.parametrize(
    ("output", "field", "message"),
    [
        ({"renditions": {"a": {}}}, "output.renditions.a", "needs either size, as 512x512, or aspect, as 4:5"),
        ({"renditions": {"a": {"size": "1x1", "aspect": "1:1"}}}, "output.renditions.a", "needs either size"),
        ({"renditions": {"a": {"size": "512"}}}, "output.renditions.a.size", "should be WIDTHxHEIGHT"),
        ({"renditions": {"a": {"size": "0x5"}}}, "output.renditions.a.size", "should be WIDTHxHEIGHT"),
        ({"renditions": {"a": {"size": "99999x5"}}}, "output.renditions.a.size", "each from 1 to 16,383"),
        ({"renditions": {"a": {"aspect": "0:1"}}}, "output.renditions.a.aspect", "should be WIDTH:HEIGHT"),
        ({"renditions": {"a": {"aspect": "99:1"}}}, "output.renditions.a.aspect", "at most 10 times the other"),
        ({"renditions": {"a": {"size": "1x1", "fit": "stretch"}}}, "output.renditions.a.fit", ""),
        ({"renditions": {"a": {"size": "1x1", "background": "red"}}}, "output.renditions.a.background", ""),
        ({"renditions": {"../a": {"size": "1x1"}}}, "output.renditions", "has the name '../a'; names become folders"),
        ({"renditions": {"default": {"size": "1x1"}}}, "output.renditions", "neither default nor thumbnails"),
        ({"thumbnail": 5}, "output.thumbnail", ""),
    ],
)
def test_mistakes_are_told_before_any_work(output: dict[str, Any], field: str, message: str) -> None:
    assert message in problems({**SMALLEST, "output": {"uri": "out", **output}})[field]


@pytest.mark.parametrize(
    ("output", "told"),
    [
        (
            {"image": {"type": "webp"}},
            ["output.image: of pictures of 16384x2000 it would have 16384x2000, and webp"],
        ),
        ({"renditions": {"a": {"aspect": "1:10", "fit": "pad"}}}, []),
        (
            {"image": {"type": "jpeg"}, "renditions": {"a": {"aspect": "1:10", "fit": "pad"}, "b": {"aspect": "1:10"}}},
            ["output.renditions.a: of pictures of 16384x2000 it would have 16384x163840, and jpeg has at most 65,500"],
        ),
    ],
)
def test_what_has_no_room_in_its_format_is_told_with_its_field(output: dict[str, Any], told: list[str]) -> None:
    found = misfits(parse_spec({**SMALLEST, "output": {"uri": "out", **output}}).output, (16384, 2000))
    assert [one[: len(expected)] for one, expected in zip(found, told, strict=True)] == told


@pytest.fixture(params=FORMATS)
def planned(request: pytest.FixtureRequest, tmp_path: Path) -> Planned:
    """A job that is done, with copies."""
    planned = Planned(LocalStore(tmp_path / "out"), request.param, slices=2, **ASKED)
    for number in range(8):
        planned.commit(number, failing=(1,) if number == 0 else ())
    assert planned.verdict().ok
    return planned


def copied(planned: Planned) -> dict[str, bytes]:
    """Key, without its edition → bytes of every copy."""
    keys = [entry.key for root in ("renditions/", "thumbnails/") for entry in planned.store.list(root)]
    return {key.replace("0000004r2", "0000004"): planned.store.get(key) for key in keys}


def test_a_copy_that_is_gone_or_altered_is_told_and_made_again_from_its_picture(planned: Planned) -> None:
    before = copied(planned)
    gone, other = (
        next(entry.key for entry in planned.store.list(f"{root}/0000004"))
        for root in ("renditions/square", "thumbnails")
    )
    planned.store.delete(gone)
    planned.store.put(other, planned.store.get(other)[:-9] + b"x" * 9)
    verdict = planned.verdict()
    assert (verdict.ok, verdict.missing, verdict.altered) == (False, [gone], [other])

    # What 'repair' does with a shard of which no picture is wrong.
    put_round(planned.store, Round(2, "repair", (), {4: Again(1, 1, ())}))
    shard, committer = replace(planned.shards[4], edition=2), planned.a_committer()
    committer.commit(shard, [end for _, end in sorted(committer.carried_over(shard).items())], {}, "w")
    verdict = planned.verdict()
    assert (verdict.ok, verdict.extra) == (True, [])
    if planned.spec.output.format == "images":  # names within the others tell the edition
        assert copied(planned) == before
    assert copied(planned).keys() == before.keys()
    assert not list(planned.store.list("thumbnails/0000004/")) or planned.spec.output.format != "images"


def test_what_nobody_named_among_copies_is_told(planned: Planned) -> None:
    planned.store.put("renditions/square/0000001r9.tar", b"x")
    planned.store.put("renditions/square/notes.txt", b"x")
    verdict = planned.verdict()
    assert (verdict.leftover, verdict.extra) == (["renditions/square/0000001r9.tar"], ["renditions/square/notes.txt"])


def test_datasets_opens_copies_by_their_names(planned: Planned, tmp_path: Path) -> None:
    write_job_card(planned.store, planned.job, planned.spec)
    tar = planned.spec.output.format == "webdataset"
    for name, size, kind in (("default", (8, 8), "png"), ("square", (6, 6), "png"), ("thumbnails", (8, 8), "webp")):
        found = loaded(tmp_path / "out", tmp_path, name=name)
        assert sorted(found["json"]["image_id"] if tar else found["image_id"]) == IDS
        assert all(example[kind if tar else "image"].size == size for example in found)
    assert "| `renditions/story/` | `story` | 9:16, pixels as they are, padded with #ff0000 |" in (
        planned.store.get("README.md").decode()
    )


def test_another_writers_pictures_are_those_that_are_copied(tmp_path: Path) -> None:
    """A tar stands already, with other pictures: copies show what is stored, not what was made here."""
    planned = Planned(LocalStore(tmp_path), "webdataset", renditions={"same": {"size": "8x8"}})
    shard = planned.shards[0]
    planned.committer.writer.finish(shard.stem, [end.picture for end in planned.ended(shard, 90) if end.picture])
    planned.commit(0, colour=10)

    members = tar_members(planned.store.get("renditions/same/0000000.tar"))
    colours = [np.asarray(Image.open(io.BytesIO(data)))[0, 0, 0] for name, data in members.items() if "png" in name]
    assert colours == [90, 91, 92, 93]
