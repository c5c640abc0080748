"""Every layout of captioned pictures, everything that can be wrong with them, and how a picture is brought to size."""

from __future__ import annotations

import csv
import io
import json
import tarfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sdbatch.errors import InputError
from sdbatch.outputs import FORMATS, EncodedPicture
from sdbatch.outputs.metadata import COLUMNS, encode_metadata
from sdbatch.storage import open_store
from sdbatch.training.captioned import CaptionedPicture, prepare, read_captioned

RED, BLUE = (255, 0, 0), (0, 0, 255)


def encoded(image: Image.Image, form: str = "PNG", **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **settings)
    return buffer.getvalue()


def plain(colour: tuple[int, ...] = RED, size: tuple[int, int] = (8, 8), form: str = "PNG") -> bytes:
    return encoded(Image.new("RGB" if len(colour) == 3 else "RGBA", size, colour), form)


def fill(folder: Path, files: Mapping[str, bytes | str]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def tar(path: Path, *members: tuple[str, bytes | str]) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members:
            content = data.encode() if isinstance(data, str) else data
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def told(path: Path) -> list[tuple[str, str]]:
    return [(picture.name, picture.caption) for picture in read_captioned(path)]


def fault(path: Path) -> str:
    with pytest.raises(InputError) as error:
        read_captioned(path)
    assert str(path) in str(error.value)
    return str(error.value)


# -- layouts ---------------------------------------------------------------------------------------------


def test_text_files_beside_pictures_in_any_depth(tmp_path: Path) -> None:
    fill(
        tmp_path,
        {
            "b/two.JPG": plain(form="JPEG"),
            "b/two.txt": "\ufeffdeux ❤\r\n",
            "a.b.png": plain(),
            "a.b.txt": " one ",
            "z/y/three.webp": plain(form="WEBP"),
            "z/y/three.txt": "three",
            "four.jpeg": plain(form="JPEG"),
            "four.txt": "four",
            "notes.md": "not looked at",
            "._a.b.png": "left by a Mac",
            ".thumbnails/x.png": "hidden",
        },
    )
    assert told(tmp_path) == [
        ("a.b.png", "one"),
        ("b/two.JPG", "deux ❤"),
        ("four.jpeg", "four"),
        ("z/y/three.webp", "three"),
    ]


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_parquet(path: Path, rows: list[dict[str, str]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
@pytest.mark.parametrize("write", [write_csv, write_jsonl, write_parquet])
def test_metadata_files(write: Callable[[Path, list[dict[str, str]]], None], column: str, tmp_path: Path) -> None:
    """Paths begin at the metadata file. A picture may have several captions; the rest counts for nothing."""
    fill(tmp_path, {"train/x/b.png": plain(), "train/a.png": plain(), "train/a.txt": "another", "LICENSE.txt": "mine"})
    rows = [("x/b.png", 'a "b",\u2028\nhere'), ("a.png", "first"), ("./x/../a.png", "second")]
    path = tmp_path / f"train/metadata.{write.__name__.removeprefix('write_')}"
    write(path, [{"width": "8", column: caption, "file_name": name} for name, caption in rows])
    names = ["train/x/b.png", "train/a.png", "train/a.png"]
    assert told(tmp_path) == list(zip(names, [caption for _, caption in rows], strict=True))


def test_a_webdataset_of_one_tar_or_several(tmp_path: Path) -> None:
    first = tar(
        tmp_path / "000.tar",
        ("a.json", json.dumps({"text": "not this", "url": 3})),
        ("a.txt", "a, by its text"),
        ("a.png", plain()),
        ("a.mask.png", "not the picture"),
        ("./x.y/b.jpg", plain(form="JPEG")),
        ("./x.y/b.json", json.dumps({"caption": "b, by its JSON"})),
        ("c.WEBP", plain(form="WEBP")),
        ("c.json", json.dumps({"prompt": "c"})),
        ("c.txt", ""),
        ("stats.json", "{}"),
        ("README", "not a sample"),
    )
    expected = [("000.tar#a.png", "a, by its text"), ("000.tar#./x.y/b.jpg", "b, by its JSON")]
    assert "not UTF-8 text (1): 000.tar#c.WEBP;" in fault(first)  # the empty c.txt
    tar(
        first,
        ("a.txt", "a, by its text"),
        ("a.png", plain()),
        ("./x.y/b.jpg", plain()),
        ("./x.y/b.txt", expected[1][1]),
    )
    assert told(first) == expected
    tar(tmp_path / "sub.tar", ("a.png", plain(BLUE)), ("a.txt", "the same key in another tar"))
    assert told(tmp_path) == [*expected, ("sub.tar#a.png", "the same key in another tar")]
    assert (prepare(read_captioned(tmp_path)[-1], 4, 4) == BLUE).all()


def output(folder: Path, form: str) -> Path:
    """What a job leaves behind: two pictures, and a row without one."""
    writer = FORMATS[form](open_store(str(folder)), "png")
    blank = dict.fromkeys(name for name, _ in COLUMNS)
    rows = [blank | {"image_id": f"i{i}", "prompt": prompt, "shard": 0} for i, prompt in enumerate(["red", "blue"])]
    batch = [
        EncodedPicture(i, row, plain(colour)) for i, (row, colour) in enumerate(zip(rows, (RED, BLUE), strict=True))
    ]
    stored = writer.finish("0000000", writer.keep("0000000", batch, last=True)).pictures
    made = [row | {"path": s.path, "status": "committed"} for row, s in zip(rows, stored, strict=True)]
    lost = blank | {"image_id": "i2", "prompt": "lost", "status": "quarantined"}
    fill(folder, {"metadata/0000000.parquet": encode_metadata([*made, lost], [])})
    return folder


@pytest.mark.parametrize("form", ["images", "webdataset"])
def test_what_a_job_made(form: str, tmp_path: Path) -> None:
    pictures = read_captioned(output(tmp_path, form))
    assert [picture.caption for picture in pictures] == ["red", "blue"]
    assert [tuple(prepare(picture, 2, 2)[0, 0]) for picture in pictures] == [RED, BLUE]
    if form == "webdataset":
        assert [caption for _, caption in told(tmp_path / "data")] == ["red", "blue"]


def test_links_are_followed_but_no_folder_is_visited_twice(tmp_path: Path) -> None:
    elsewhere = fill(tmp_path / "elsewhere", {"a.png": plain(), "a.txt": "a", "sub/b.png": plain(), "sub/b.txt": "b"})
    folder = fill(tmp_path / "folder", {"c.txt": "c"})
    (folder / "c.png").symlink_to(elsewhere / "a.png")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "again").symlink_to(folder)
    assert told(folder) == [("c.png", "c"), ("linked/a.png", "a"), ("linked/sub/b.png", "b")]


# -- what can be wrong -----------------------------------------------------------------------------------


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    fill(tmp_path, {f"{i}.png": plain() for i in range(7)} | {"7.png": plain(), "7.txt": b"\xff\xfe", "8.txt": "alone"})
    fill(tmp_path, {"9.png": b"GIF89a", "9.txt": "nine", "10.png": plain()[:20], "10.txt": "ten"})
    (tmp_path / "11.png").symlink_to(tmp_path / "gone.png")
    fill(tmp_path, {"11.txt": "eleven"})
    assert fault(tmp_path).splitlines()[1:] == [
        "  pictures whose caption is missing, empty or not UTF-8 text (8): 0.png, 1.png, 2.png, 3.png, 4.png and 3 "
        "more; write one for each or remove the pictures",
        "  files that can't be read (3): 10.png (Truncated File Read), 11.png (No such file or directory), "
        "9.png (no PNG, JPEG or WebP picture); replace or remove them",
        "  captions without a PNG, JPEG or WebP picture (1): 8.txt; add the pictures or remove the captions",
    ]


def bomb(side: int) -> bytes:
    """A PNG whose header promises ``side``² pixels."""
    data = bytearray(plain())
    data[16:24] = side.to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(("side", "message"), [(9000, "9000x9000 pixels"), (12000, "12000x12000"), (60000, "bomb")])
def test_too_large_pictures_are_refused_by_their_headers(side: int, message: str, tmp_path: Path) -> None:
    fill(tmp_path, {"a.png": bomb(side), "a.txt": "a"})
    assert message in fault(tmp_path)


@pytest.mark.parametrize("name", ["../x.png", "/etc/x.png", "a/../../x.png", ".."])
def test_tables_do_not_lead_out_of_the_folder(name: str, tmp_path: Path) -> None:
    fill(tmp_path, {"x.png": plain(), "data/a.png": plain()})
    write_jsonl(
        tmp_path / "data/metadata.jsonl", [{"file_name": "a.png", "text": "a"}, {"file_name": name, "text": "x"}]
    )
    assert f"lead out of the folder (1): metadata.jsonl, row 2: '{name}'; copy or link" in fault(tmp_path / "data")


def test_tables_and_pictures_that_do_not_agree(tmp_path: Path) -> None:
    fill(tmp_path, {name: plain() for name in ("a.png", "b.png", "c.png")} | {"d.gif": "gif"})
    rows = [("a.png", "a"), ("b.png", " "), ("gone.png", "x"), ("d.gif", "d"), ("", "x"), ("a\0.png", "x")]
    write_jsonl(tmp_path / "metadata.jsonl", [{"file_name": name, "text": text} for name, text in rows])
    message = fault(tmp_path)
    assert "not UTF-8 text (2): b.png, c.png;" in message
    assert (
        "WebP picture (4): metadata.jsonl, row 3: 'gone.png', metadata.jsonl, row 4: 'd.gif', metadata.jsonl, row 5: ''"
        in message
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.csv", "file,text\na.png,a\n", "columns 'file_name' and one of .* it has 'file', 'text'"),
        ("metadata.csv", "file_name,label\na.png,a\n", "one of 'text', 'caption', 'prompt'; it has"),
        ("metadata.csv", "", "it has none"),
        ("metadata.csv", b"file_name,text\na.png,\xff\n", "can't be read: .*utf-8"),
        ("metadata.csv", 'file_name,text\na.png,"a" b\n', "can't be read"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "a"}\n{\n', "line 2 is not JSON"),
        ("metadata.jsonl", "[1]\n", "line 1 is not a JSON object"),
        ("metadata.parquet", "PAR1", "metadata.parquet can't be read"),
        ("metadata/0.parquet", "PAR1", "0.parquet can't be read"),
    ],
)
def test_tables_that_can_not_be_read(name: str, content: bytes | str, message: str, tmp_path: Path) -> None:
    fill(tmp_path, {"a.png": plain(), name: content})
    with pytest.raises(InputError, match=message):
        read_captioned(tmp_path)


def test_two_tables_in_a_folder(tmp_path: Path) -> None:
    fill(tmp_path, {"metadata.csv": "file_name,text\n", "metadata.jsonl": "{}"})
    assert "keep one of them" in fault(tmp_path)


def test_pictures_and_tars_in_one_folder(tmp_path: Path) -> None:
    tar(fill(tmp_path, {"a.png": plain()}) / "b.tar")
    assert "both pictures and .tar files" in fault(tmp_path)


def test_faulty_samples(tmp_path: Path) -> None:
    tar(
        tmp_path / "0.tar",
        *[("a.png", plain()), ("a.txt", "a"), ("a.jpg", plain()), ("a.txt", "a")],
        *[("b.png", plain()), ("b.json", '{"text": ["not", "text"]}')],
        *[("c.png", b"no picture"), ("c.txt", "c"), ("d.txt", "d"), ("e.json", '{"caption": "e"}')],
    )
    message = fault(tmp_path)
    assert "members whose sample has such a one already (2): 0.tar#a.jpg, 0.tar#a.txt; keep one" in message
    assert "not UTF-8 text (1): 0.tar#b.png;" in message
    assert "0.tar#c.png (no PNG, JPEG or WebP picture)" in message
    assert "WebP picture (2): 0.tar#d, 0.tar#e;" in message


@pytest.mark.parametrize("damage", ["empty", "compressed", "cut", "header"])
def test_damaged_tars(damage: str, tmp_path: Path) -> None:
    path = tar(tmp_path / "0.tar", ("a.png", plain()), ("a.txt", "a"), ("b.png", plain()), ("b.txt", "b"))
    data = bytearray(path.read_bytes())
    if damage == "header":
        data[2048 + 148] ^= 1  # the checksum of the third header
    changed = {"empty": b"", "compressed": b"\x1f\x8b" + bytes(600), "cut": data[: 3 * 1024 + 512], "header": data}
    path.write_bytes(changed[damage])
    assert "files that can't be read (1): 0.tar (" in fault(tmp_path)


@pytest.mark.parametrize("form", ["images", "webdataset"])
def test_pictures_missing_from_a_jobs_output(form: str, tmp_path: Path) -> None:
    for path in output(tmp_path, form).glob("data/**/*.*"):
        path.unlink()
    assert {"images": "WebP picture (2): ", "webdataset": "0000000.tar ("}[form] in fault(tmp_path)


def test_a_jobs_output_in_parquet(tmp_path: Path) -> None:
    assert "webdataset or images" in fault(output(tmp_path, "parquet"))


def test_a_jobs_table_does_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    fill(tmp_path, {"x.png": plain()})
    row = dict.fromkeys(name for name, _ in COLUMNS) | {"prompt": "x", "path": "../x.png", "status": "committed"}
    fill(tmp_path / "out", {"metadata/0000000.parquet": encode_metadata([row], [])})
    assert "lead out of the folder" in fault(tmp_path / "out")


@pytest.mark.parametrize(("name", "message"), [("gone", "does not exist"), ("", "no captioned pictures found")])
def test_nothing_there(name: str, message: str, tmp_path: Path) -> None:
    assert message in fault(tmp_path / name if name else tmp_path)


# -- pictures --------------------------------------------------------------------------------------------


def prepared(tmp_path: Path, data: bytes, width: int, height: int) -> np.ndarray:
    fill(tmp_path, {"picture": data})
    pixels = prepare(CaptionedPicture("picture", "x", tmp_path / "picture"), width, height)
    assert (pixels.shape, pixels.dtype) == ((height, width, 3), np.uint8)
    return pixels


def halves(size: tuple[int, int]) -> Image.Image:
    """Red, its right half blue."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    return image


def test_the_picture_covers_the_size_and_is_cut_around_its_centre(tmp_path: Path) -> None:
    image = halves((90, 10))
    image.paste((0, 255, 0), (0, 0, 30, 10))
    image.paste((0, 255, 0), (60, 0, 90, 10))
    for size in ((30, 10), (60, 20), (15, 5)):
        pixels = prepared(tmp_path, encoded(image), *size)
        left, right = size[0] // 4, size[0] * 3 // 4
        assert (pixels[:, left] == RED).all()
        assert (pixels[:, right] == BLUE).all()
        assert pixels[:, left:right, 1].max() == 0
    tall = prepared(tmp_path, encoded(halves((2, 9000))), 64, 64)
    assert (tall[:, 0] == RED).all()


def test_the_picture_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter to the right
    pixels = prepared(tmp_path, encoded(halves((16, 16)), exif=exif), 16, 16)
    assert (pixels[0] == RED).all()
    assert (pixels[-1] == BLUE).all()


def test_transparency_shows_white(tmp_path: Path) -> None:
    assert (prepared(tmp_path, plain((9, 9, 9, 0)), 4, 4) == 255).all()
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([*RED, *BLUE])
    assert (prepared(tmp_path, encoded(palette), 4, 4) == BLUE).all()
    assert (prepared(tmp_path, encoded(palette, transparency=1), 4, 4) == 255).all()
    grey = Image.new("LA", (8, 8), (0, 128))
    assert abs(int(prepared(tmp_path, encoded(grey), 4, 4)[0, 0, 0]) - 127) <= 1


def test_other_kinds_of_pixels(tmp_path: Path) -> None:
    deep = Image.fromarray(np.full((8, 8), 257 * 100, np.uint16))
    assert (prepared(tmp_path, encoded(deep), 4, 4) == 100).all()
    assert (prepared(tmp_path, encoded(Image.new("1", (8, 8), 1)), 4, 4) == 255).all()
    inks = prepared(tmp_path, encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), 4, 4)
    assert np.abs(inks.astype(int) - RED).max() < 8


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    fill(tmp_path, {"a.png": encoded(noise)[:-900], "a.txt": "a"})
    (picture,) = read_captioned(tmp_path)
    with pytest.raises(InputError, match=r"picture a\.png can't be read: .*; replace or remove it"):
        prepare(picture, 8, 8)
    picture.file.unlink()
    with pytest.raises(InputError, match=r"picture a\.png can't be read: No such file"):
        prepare(picture, 8, 8)
