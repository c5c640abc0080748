"""Prompt tables: which files an input names, and what each must look like."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sdbatch.errors import InputError, told_of
from sdbatch.spec import Input
from sdbatch.storage import Entry, Source, open_source, root_length

ENDINGS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "text",
}


@dataclass(frozen=True)
class InputFile:
    """One file of the table; ``version`` changes when its bytes do."""

    name: str  # below the input's root
    uri: str
    bytes: int
    version: str

    def told(self) -> dict[str, object]:
        """What a plan remembers of it; of a file at one commit also where that very file is found again."""
        where = {"uri": self.uri} if self.uri.startswith("hf://") else {}
        return {"name": self.name, "bytes": self.bytes, "version": self.version, **where}


@dataclass(frozen=True)
class Table:
    """The files of an input in the order of their names, all of one format."""

    format: str
    files: tuple[InputFile, ...]


def find_table(source: Input) -> Table:
    """Look up the files that ``source.uri`` names. Raises InputError where there are none, or of two kinds."""
    with told_of("input.uri", InputError):
        root, entries = _matching(source)
        if not entries:
            raise InputError(
                f"input.uri: {_absolute(source.uri)} names no table; check the path and the files' endings"
            )
        kinds = {entry.key: source.format or _format(entry.key) for entry in entries}
        if len(set(kinds.values())) > 1:
            told = ", ".join(f"{key} ({kind})" for key, kind in list(kinds.items())[:4])
            raise InputError(
                f"input.uri: {source.uri} mixes formats: {told}; narrow it by a glob such as {source.uri}/*.csv"
            )
        files = [
            InputFile(entry.key, f"{root.uri}/{entry.key}", entry.size, root.version(entry.key)) for entry in entries
        ]
    return Table(kinds[files[0].name], tuple(files))


def changed_files(before: Sequence[dict[str, object]], now: Table) -> list[str]:
    """What differs between the files a plan was made from and those of today, in words."""
    old = {str(file["name"]): file for file in before}
    new = {file.name: file for file in now.files}
    if len(old) == len(new) == 1:  # one file under another name is the same input if its bytes are
        (old_name,), (new_name,) = old, new
        old = {new_name: old[old_name]}
    told = [f"input: {name} is gone" for name in sorted(old.keys() - new.keys())]
    told += [f"input: {name} is new" for name in sorted(new.keys() - old.keys())]
    for name in sorted(old.keys() & new.keys()):
        if old[name]["version"] != new[name].version:
            then = f"; what was planned is {old[name]['uri']}" if "uri" in old[name] else ""
            told.append(f"input: {name} changed ({old[name]['bytes']} → {new[name].bytes} bytes{then})")
    return told


def unlike_growth(before: Sequence[dict[str, object]], now: Table) -> list[str]:
    """What of the differences is more than new files after the old ones and a last old file that changed, in words."""
    old, new = [str(file["name"]) for file in before], [file.name for file in now.files]
    if len(old) == len(new) == 1:
        return []
    told = [f"input: {name} is gone" for name in old if name not in new]
    told += [f"input: {name} is new, and not after {old[-1]}" for name in new if name not in old and name < old[-1]]
    versions = {file.name: file.version for file in now.files}
    for file in before[:-1]:
        if versions.get(str(file["name"]), file["version"]) != file["version"]:
            told.append(f"input: {file['name']} changed, and is not the last of those that were planned")
    return told


def _matching(source: Input) -> tuple[Source, list[Entry]]:
    """The source at the part of the URI without wildcards, and the objects below it that match."""
    uri = source.uri
    wild = re.search(r"[*?\[]", uri)
    if wild:
        fixed = uri[: wild.start()].rpartition("/")[0]
        root = open_source(fixed or ("/" if uri.startswith("/") else "."))
        pattern = _glob(uri[len(fixed) :].lstrip("/"))
        return root, [entry for entry in _files(root) if pattern.fullmatch(entry.key)]
    parent, _, name = uri.rstrip("/").rpartition("/")
    if name and len(parent) >= root_length(uri):
        single = open_source(parent or ("/" if uri.startswith("/") else "."))
        if (found := single.find(name)) is not None:
            return single, [found]
    folder = open_source(uri)
    entries = [entry for entry in _files(folder) if not re.search(r"(^|/)[._]", entry.key)]
    return folder, [entry for entry in entries if source.format or _ending(entry.key) in ENDINGS]


def _files(source: Source) -> Iterator[Entry]:
    """What is below it, without the empty objects that S3's console makes of folders."""
    return (entry for entry in source.list() if entry.key and not entry.key.endswith("/"))


def _glob(pattern: str) -> re.Pattern[str]:
    """``*`` and ``?`` stay within a folder, ``**/`` crosses folders, ``[ab]`` and ``[!ab]`` choose characters."""
    translated = ""
    for part in re.findall(r"\*\*/|\*|\?|\[[^\]]+\]|.", pattern):
        if part.startswith("[") and len(part) > 2:
            translated += "[^" + part[2:] if part.startswith("[!") else part
        else:
            translated += {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}.get(part) or re.escape(part)
    try:
        return re.compile(translated)
    except re.error as error:
        raise InputError(f"input.uri: {pattern} is no pattern: {error}") from None


def _format(key: str) -> str:
    ending = _ending(key)
    if ending not in ENDINGS:
        formats = ", ".join(sorted(set(ENDINGS.values())))
        raise InputError(f"input.uri: {key}: the ending tells no format; set input.format to one of {formats}")
    return ENDINGS[ending]


def _ending(key: str) -> str:
    return "." + key.lower().rpartition("/")[2].rpartition(".")[2]


def _absolute(uri: str) -> str:
    return uri if "://" in uri else open_source(uri).uri
