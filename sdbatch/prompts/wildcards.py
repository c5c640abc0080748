"""Wildcard files: NAME.txt, one possibility a line, for ``__NAME__`` in templates."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from sdbatch.errors import InputError, told_of
from sdbatch.prompts.expansion import Wildcards, longest, matching
from sdbatch.prompts.template import (
    MOST_NESTED,
    BadTemplate,
    Column,
    Option,
    Template,
    Wildcard,
    inner_parts,
    parse,
    parse_option,
)
from sdbatch.spec import Prompt
from sdbatch.storage import open_source

_MOST_FILES = 2_000
_MOST_BYTES = 8 << 20  # of all files
_LONGEST = 100_000  # characters of a prompt
_SHOWN = 10


@dataclass(frozen=True)
class WildcardFiles:
    """What a folder's files hold. ``sha256``: name → digest of the file, which decides what is made."""

    lines: Wildcards = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)


def read_wildcards(prompt: Prompt) -> WildcardFiles:
    """Read the .txt files that the spec's template names, and that they name in turn; all where rows have templates.

    Raises InputError. What else lies in the folder neither matters nor has to be in order.
    """
    lines: dict[str, tuple[Option, ...]] = {}
    sums: dict[str, str] = {}
    with told_of("prompt.wildcards", InputError):
        store = open_source(prompt.wildcards or "")
        sizes = {e.key.removesuffix(".txt"): e.size for e in store.list() if e.key.endswith(".txt")}
        if not sizes:
            raise InputError(f"prompt.wildcards: {store.uri} holds no .txt files")
        wanted, left = sorted(sizes) if prompt.template is None else _named(_parsed(prompt), sizes), _MOST_BYTES
        while wanted:
            name = wanted.pop()
            if name in lines:
                continue
            left -= sizes[name]
            if left < 0 or len(lines) == _MOST_FILES:
                told = f"up to {_MOST_FILES:,} files of {_MOST_BYTES >> 20} MiB together are read"
                raise InputError(f"prompt.wildcards: the job uses more of {store.uri} than that: {told}")
            data = store.get(f"{name}.txt")
            lines[name], sums[name] = tuple(_options(data, f"{name}.txt")), hashlib.sha256(data).hexdigest()
            wanted += [found for option in lines[name] for found in _named(option.parts, sizes)]
    lines, sums = dict(sorted(lines.items())), dict(sorted(sums.items()))
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
    found = weighed = False
    for number, line in enumerate(text.split("\n"), 1):
        said = line.strip()
        if not said or said.startswith("#"):
            continue
        found = True
        try:
            option = parse_option(said)
            weighed = weighed or option.weight > 0
            yield option
        except BadTemplate as error:
            raise InputError(f"prompt.wildcards: {key}, line {number}: {error}") from None
    if not found:
        raise InputError(f"prompt.wildcards: {key} has no lines")
    if not weighed:
        raise InputError(f"prompt.wildcards: {key} gives all its lines no weight")


def _refuse_unending(wildcards: Wildcards) -> None:
    """Raise InputError for files that come back to themselves, or go too deep."""
    depths: dict[str, int] = {}

    def depth(name: str, above: tuple[str, ...]) -> int:
        if name in above:
            raise InputError(f"prompt.wildcards: {' → '.join((*above, name))} goes round in a circle")
        if len(above) > MOST_NESTED:
            raise InputError(f"prompt.wildcards: {above[0]} names files that name files, more than {MOST_NESTED} deep")
        if name not in depths:
            inner = {found for option in wildcards[name] for found in _named(option.parts, wildcards)}
            depths[name] = max((depth(found, (*above, name)) + 1 for found in sorted(inner)), default=0)
        return depths[name]

    for name in sorted(wildcards):
        depth(name, ())


def _named(template: Template, known: Iterable[str]) -> list[str]:
    """The files that a template names, of those that there are."""
    names = [part.name for part in inner_parts(template) if isinstance(part, Wildcard)]
    return [found for name in names for found in matching(name, known)]


def _parsed(prompt: Prompt) -> Template:
    try:
        return parse(prompt.template or "")
    except BadTemplate as error:
        raise InputError(f"prompt.template: {error}") from None
