"""Wildcard files: NAME.txt, one possibility a line, for ``__NAME__`` in templates."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from sdbatch.errors import InputError, StorageError
from sdbatch.prompts.expansion import Wildcards, longest, matching
from sdbatch.prompts.template import (
    MOST_NESTED,
    BadTemplate,
    Column,
    Option,
    Template,
    Wildcard,
    inner_parts,
    parse_option,
)
from sdbatch.storage import open_store

_MOST_FILES = 2_000
_MOST_BYTES = 8 << 20  # of all files
_LONGEST = 100_000  # characters of a prompt
_SHOWN = 10


@dataclass(frozen=True)
class WildcardFiles:
    """What a folder's files hold. ``sha256``: name → digest of the file, which decides what is made."""

    lines: Wildcards = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)


def read_wildcards(uri: str) -> WildcardFiles:
    """Read every .txt file below a folder, local or in a store. Raises InputError."""
    lines: dict[str, tuple[Option, ...]] = {}
    sums: dict[str, str] = {}
    try:
        store = open_store(uri, linked=True)
        entries = [entry for entry in store.list() if entry.key.endswith(".txt")]
        size = sum(entry.size for entry in entries)
        if not entries:
            raise InputError(f"prompt.wildcards: {store.uri} holds no .txt files")
        if len(entries) > _MOST_FILES or size > _MOST_BYTES:
            raise InputError(
                f"prompt.wildcards: {store.uri} holds {len(entries):,} files of {size:,} bytes; up to {_MOST_FILES:,} "
                f"files of {_MOST_BYTES >> 20} MiB together are read"
            )
        for entry in entries:
            data = store.get(entry.key)
            name = entry.key.removesuffix(".txt")
            lines[name], sums[name] = tuple(_options(data, entry.key)), hashlib.sha256(data).hexdigest()
    except StorageError as error:
        raise InputError(f"prompt.wildcards: {error}") from None
    found = WildcardFiles(lines, sums)
    _refuse_unending(found.lines)
    for name, options in lines.items():
        for option in options:
            if any(isinstance(part, Column) for part in inner_parts(option.parts)):
                raise InputError(f"prompt.wildcards: {name}.txt names a column in braces; only templates can")
            check_template(option.parts, found.lines, f"prompt.wildcards: {name}.txt")
    return found


def check_template(template: Template, wildcards: Wildcards, where: str) -> None:
    """Raise InputError for a wildcard that no file has, and for prompts without end."""
    for part in inner_parts(template):
        if isinstance(part, Wildcard) and not matching(part.name, wildcards):
            known = ", ".join(sorted(wildcards)[:_SHOWN]) or "none: name their folder in prompt.wildcards"
            raise InputError(f"{where}: there is no wildcard file {part.name}.txt; there is: {known}")
    if longest(template, wildcards, {}) > _LONGEST:
        raise InputError(f"{where}: its prompts can have more than {_LONGEST:,} characters")


def _options(data: bytes, key: str) -> Iterator[Option]:
    """The lines of a file, without blank ones and those that begin with #."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"prompt.wildcards: {key} is not UTF-8 text") from None
    found = False
    for number, line in enumerate(text.split("\n"), 1):
        said = line.strip()
        if not said or said.startswith("#"):
            continue
        found = True
        try:
            yield parse_option(said)
        except BadTemplate as error:
            raise InputError(f"prompt.wildcards: {key}, line {number}: {error}") from None
    if not found:
        raise InputError(f"prompt.wildcards: {key} has no lines")


def _refuse_unending(wildcards: Wildcards) -> None:
    """Raise InputError for files that come back to themselves, or go too deep."""
    depths: dict[str, int] = {}

    def depth(name: str, above: tuple[str, ...]) -> int:
        if name in above:
            raise InputError(f"prompt.wildcards: {' → '.join((*above, name))} goes round in a circle")
        if len(above) > MOST_NESTED:
            raise InputError(f"prompt.wildcards: {above[0]} names files that name files, more than {MOST_NESTED} deep")
        if name not in depths:
            inner = {found for option in wildcards[name] for found in _named(option, wildcards)}
            depths[name] = max((depth(found, (*above, name)) + 1 for found in sorted(inner)), default=0)
        return depths[name]

    for name in sorted(wildcards):
        depth(name, ())


def _named(option: Option, wildcards: Wildcards) -> Iterator[str]:
    for part in inner_parts(option.parts):
        if isinstance(part, Wildcard):
            yield from matching(part.name, wildcards)
