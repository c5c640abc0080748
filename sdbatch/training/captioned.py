"""A user's captioned pictures: found and checked before training starts, opened one by one while it runs.

Layouts that are read:

    text files      NAME.png with its caption in NAME.txt beside it, in folders of any depth
    metadata files  metadata.csv, .jsonl or .parquet with the columns "file_name", a path from there on, and "text",
                    "caption" or "prompt": the imagefolder layout of Hugging Face. Text files count for nothing then
    WebDataset      .tar files where KEY.png and KEY.txt or KEY.json are a sample; KEY ends at the first dot of the name
    our own output  of jobs whose format is images or webdataset; rows without a picture are passed over

Pictures are PNG, JPEG or WebP. Files whose names begin with a dot are passed over. Nothing is unpacked to disk.
"""

from __future__ import annotations

import os
import posixpath
import re
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NoReturn

from PIL import Image

from sdbatch.diffusion.weights import some
from sdbatch.errors import InputError
from sdbatch.training import caption_files
from sdbatch.training.pictures import CaptionedPicture, open_header, prepare

__all__ = ["CaptionedPicture", "prepare", "read_captioned"]

_ENDINGS = ("png", "jpg", "jpeg", "webp")
_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")  # a member's key and ending

# What can be wrong with many pictures at once → what to do about it.
_NO_CAPTION = "pictures whose caption is missing, empty or not UTF-8 text"
_NO_PICTURE = "captions without a PNG, JPEG or WebP picture"
_OUTSIDE = "paths that lead out of the folder"
_TWICE = "members whose sample has such a one already"
_UNREADABLE = "files that can't be read"
_REMEDIES = {
    _NO_CAPTION: "write one for each or remove the pictures",
    _NO_PICTURE: "add the pictures or remove the captions",
    _OUTSIDE: "copy or link the pictures into it",
    _TWICE: "keep one picture and one caption under each key",
    _UNREADABLE: "replace or remove them",
}


def read_captioned(path: Path) -> list[CaptionedPicture]:
    """All captioned pictures of a folder or of one .tar file, in the order of the names, or of the table's rows.

    Pictures are looked at by their headers, none is decoded. Raises InputError with all that is wrong at once: pictures
    without captions, captions without pictures, paths that lead elsewhere, files that are no pictures or too large.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist; name a folder of captioned pictures or a .tar file")
    files = _files(path) if path.is_dir() else [path]
    tars = [file for file in files if file.suffix.lower() == ".tar"]
    found = _Found(path)
    if tables := caption_files.job_tables(path):
        _read_output(found, tables)
    elif tables := [file for file in files if file.name in caption_files.TABLES]:
        _read_tables(found, tables, files)
    elif tars and any(_is_picture(file) for file in files):
        raise InputError(f"{path} holds both pictures and .tar files; put them into folders of their own")
    elif tars:
        for file in tars:
            _read_samples(found, file)
    else:
        _read_text_files(found, files)
    return found.checked()


class _Found:
    """The pictures found so far and, by what is wrong with them, the names of those that can't be used."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pictures: list[CaptionedPicture] = []
        self.faults: dict[str, list[str]] = {}

    def name(self, file: Path) -> str:
        return file.name if file == self.root else file.relative_to(self.root).as_posix()

    def fault(self, kind: str, name: str) -> None:
        self.faults.setdefault(kind, []).append(name)

    def add(self, picture: CaptionedPicture) -> None:
        if not picture.caption:
            self.fault(_NO_CAPTION, picture.name)
        self.pictures.append(picture)

    def add_file(self, file: Path, caption: str) -> None:
        name = self.name(file)
        try:
            with file.open("rb") as stream:
                self.look(name, stream)
        except OSError as error:
            self.fault(_UNREADABLE, f"{name} ({error.strerror})")
        self.add(CaptionedPicture(name, caption, file))

    def look(self, name: str, stream: IO[bytes]) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # it becomes a fault
                open_header(stream)
        except Exception as error:  # Pillow's readers raise whatever a damaged file makes them
            self.fault(_UNREADABLE, f"{name} ({error})")

    def members(self, tar: Path) -> Iterator[tuple[tarfile.TarInfo, IO[bytes]]]:
        """The files in a tar. ``tarfile`` takes a damaged header for the end; here it is a fault."""
        try:
            with tar.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
                end = os.fstat(file.fileno()).st_size
                for member in archive:
                    stream = archive.extractfile(member) if member.isreg() and not member.issparse() else None
                    if member.offset_data + member.size > end:
                        raise tarfile.ReadError("it is cut off")
                    if stream is not None:
                        yield member, stream
                file.seek(archive.offset)
                if any(file.read(tarfile.BLOCKSIZE)):
                    raise tarfile.ReadError(f"it is damaged at byte {archive.offset:,}")
        except (tarfile.TarError, OSError) as error:
            self.fault(_UNREADABLE, f"{self.name(tar)} ({error})")

    def checked(self) -> list[CaptionedPicture]:
        if self.faults:
            told = [
                f"  {kind} ({len(names):,}): {some(names)}; {_REMEDIES[kind]}" for kind, names in self.faults.items()
            ]
            raise InputError(f"{self.root}: not all captioned pictures can be used\n" + "\n".join(told))
        if not self.pictures:
            raise InputError(
                f"{self.root}: no captioned pictures found; name a folder of PNG, JPEG or WebP files with captions in "
                f".txt files beside them or in {', '.join(caption_files.TABLES)}, or WebDataset .tar files"
            )
        return self.pictures


# -- layouts ---------------------------------------------------------------------------------------------


def _read_text_files(found: _Found, files: Sequence[Path]) -> None:
    captions = {file.with_suffix(""): file for file in files if file.suffix.lower() == ".txt"}
    pictures = [file for file in files if _is_picture(file)]
    for file in pictures:
        beside = captions.get(file.with_suffix(""))
        found.add_file(file, caption_files.text_file(beside) if beside else "")
    for stem in sorted(captions.keys() - {file.with_suffix("") for file in pictures}):
        found.fault(_NO_PICTURE, found.name(captions[stem]))


def _read_tables(found: _Found, tables: Sequence[Path], files: Sequence[Path]) -> None:
    if len({table.parent for table in tables}) < len(tables):
        raise InputError(f"{found.root}: a folder has several of {', '.join(caption_files.TABLES)}; keep one of them")
    listed = set()
    for table in tables:
        for number, (name, caption) in enumerate(caption_files.table_rows(table), 1):
            file = _inside(table.parent, name)
            if file is None or not (_is_picture(file) and file.is_file()):
                found.fault(_NO_PICTURE if file else _OUTSIDE, f"{found.name(table)}, row {number}: '{name}'")
            else:
                listed.add(file)
                found.add_file(file, caption)
    for file in files:
        if _is_picture(file) and file not in listed:
            found.fault(_NO_CAPTION, found.name(file))


def _read_samples(found: _Found, tar: Path) -> None:
    pictures: dict[str, tarfile.TarInfo] = {}
    captions: dict[str, dict[str, str]] = {"txt": {}, "json": {}}
    for member, stream in found.members(tar):
        parts = _MEMBER.fullmatch(member.name)
        if parts is None:
            continue
        name, key, ending = f"{found.name(tar)}#{member.name}", parts[1], parts[2].lower()
        if key in (pictures if ending in _ENDINGS else captions.get(ending, {})):
            found.fault(_TWICE, name)
        elif ending in _ENDINGS:
            pictures[key] = member
            found.look(name, stream)
        elif ending == "txt":
            captions[ending][key] = caption_files.text_caption(stream.read())
        elif ending == "json":
            captions[ending][key] = caption_files.json_caption(stream.read())
    told = {key: text for key, text in captions["json"].items() if text} | captions["txt"]
    for key, member in pictures.items():
        name = f"{found.name(tar)}#{member.name}"
        found.add(CaptionedPicture(name, told.get(key, ""), tar, member.offset_data, member.size))
    for key in sorted(told.keys() - pictures.keys()):
        found.fault(_NO_PICTURE, f"{found.name(tar)}#{key}")


def _read_output(found: _Found, tables: Sequence[Path]) -> None:
    members: dict[Path, dict[str, str]] = {}  # of each tar: member → caption
    for table in tables:
        for path, caption in caption_files.job_rows(table):
            key, _, member = path.partition("#")
            file = _inside(found.root, key)
            if file is None:
                found.fault(_OUTSIDE, f"{found.name(table)}: '{key}'")
            elif file.suffix == ".parquet":
                raise InputError(
                    f"{found.root}: its pictures lie in Parquet files, which can't be trained on; run the job with "
                    "output.format: webdataset or images"
                )
            elif member:
                members.setdefault(file, {})[member] = caption
            elif file.is_file():
                found.add_file(file, caption)
            else:
                found.fault(_NO_PICTURE, f"{found.name(table)}: '{key}'")
    for tar, captions in members.items():
        for info, stream in found.members(tar):
            if info.name in captions:
                name = f"{found.name(tar)}#{info.name}"
                found.look(name, stream)
                found.add(CaptionedPicture(name, captions.pop(info.name), tar, info.offset_data, info.size))
        for name in captions:
            found.fault(_NO_PICTURE, f"{found.name(tar)}#{name}")


# -- files -----------------------------------------------------------------------------------------------


def _files(root: Path) -> list[Path]:
    """All files below ``root``, sorted; links to folders are followed, but no folder is visited twice."""

    def refuse(error: OSError) -> NoReturn:
        raise InputError(f"{error.filename} can't be read: {error.strerror}")

    files, seen = [], set()
    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        files += [] if real in seen else [Path(folder, name) for name in names if not name.startswith(".")]
        seen.add(real)
    return sorted(files)


def _inside(folder: Path, name: str) -> Path | None:
    """The file of that name in the folder; None if the name leads out of it."""
    path = posixpath.normpath(name)
    return None if path.startswith("/") or path.split("/")[0] == ".." else folder / path


def _is_picture(file: Path) -> bool:
    return file.suffix.lower().removeprefix(".") in _ENDINGS
