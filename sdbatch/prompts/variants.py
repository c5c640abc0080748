"""The variants of a row: its prompts, drawn or all, each with every combination of the matrix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sdbatch.errors import InputError, UsageError
from sdbatch.prompts.expansion import Chance, Wildcards, Words, count, drawn, every, longest
from sdbatch.prompts.fault import BadValue
from sdbatch.prompts.template import BadTemplate, Choice, Column, Template, inner_parts, parse
from sdbatch.prompts.wildcards import check_template
from sdbatch.spec import MATRIX_FIELDS, JobSpec, combinations, words_of

#: Prompts that a template may make of one row.
_MOST_PROMPTS = 10_000
#: Characters of all prompts of a row, and of a template.
_MOST_CHARACTERS = 100_000_000
_LONGEST_TEMPLATE = 20_000
#: What the columns of a template are called among the cells of a row.
CELL = "word:"


@dataclass(frozen=True)
class Variant:
    """One prompt of a row under one combination of the matrix."""

    cells: Mapping[str, str]  # fields of the request in place of the row's
    words: Mapping[str, str]  # those of the matrix, which the metadata keep
    template: str | None
    prompt: int  # its place among the row's prompts: each has seeds of its own


class Variants:
    """Makes the variants of rows; all that they have in common is read once."""

    def __init__(self, spec: JobSpec, wildcards: Wildcards) -> None:
        self._prompt, self._wildcards = spec.prompt, wildcards
        self._words = words_of(spec.matrix)
        self._combinations = list(combinations(spec.matrix))
        self._kept = list(spec.input.kept)
        self._counts, self._longest, self._sums = dict[str, int](), dict[str, int](), dict[str, list[float]]()
        self._template = None if spec.prompt.template is None else parse(spec.prompt.template)

    def __call__(self, row: Mapping[str, str | None], row_id: str) -> Iterator[Variant]:
        """In order: the matrix, then the prompts. Raises BadValue."""
        written = self._prompt.template or row.get("template")
        template = self._template or (self._row_template(written) if written is not None else None)
        for combination in self._combinations:
            cells = {name: value for name, value in combination.items() if name not in self._words}
            words = {name: combination[name] for name in self._words}
            if template is None:
                yield Variant(cells, words, None, 0)
                continue
            known = {name.removeprefix(CELL): cell or "" for name, cell in row.items() if name.startswith(CELL)}
            known |= {name: row.get(f"keep:{name}") or "" for name in self._kept} if self._template is None else {}
            said = Words(known | words, self._wildcards, self._counts, self._sums)
            for number, prompt in enumerate(self._prompts(template, said, row_id)):
                yield Variant({**cells, "prompt": prompt}, words, written, number)

    def _row_template(self, text: str) -> Template:
        if len(text) > _LONGEST_TEMPLATE:
            raise BadValue(f"its template has {len(text):,} characters; at most {_LONGEST_TEMPLATE:,} are read")
        try:
            template = parse(text)
            check_template(template, self._wildcards, "its template")
        except (BadTemplate, InputError) as error:
            raise BadValue(f"its template can't be read: {error}") from None
        known = {*self._kept, *self._words}
        unknown = [part.name for part in inner_parts(template) if isinstance(part, Column) and part.name not in known]
        if unknown:
            raise BadValue(f"its template names {{{unknown[0]}}}, which neither input.keep nor matrix gives")
        return template

    def _prompts(self, template: Template, words: Words, row_id: str) -> Iterator[str]:
        empty = [
            part.name for part in inner_parts(template) if isinstance(part, Column) and not words.values[part.name]
        ]
        if empty:
            raise BadValue(f"its template needs {{{empty[0]}}}, and the row has nothing there")
        ways = count(template, words) if self._prompt.expansion == "all" else self._prompt.samples
        if told := _too_many(ways, len(self._combinations)):
            raise BadValue(f"its template {told}")
        characters = ways * longest(template, self._wildcards, self._longest, words.values)
        if characters > _MOST_CHARACTERS:
            raise BadValue(f"its template makes {ways:,} prompts of up to {characters // ways:,} characters")
        if self._prompt.expansion == "all":
            yield from every(template, words)
            return
        for number in range(ways):
            yield drawn(template, words, Chance(self._prompt.wildcard_seed, row_id, number))


def template_columns(spec: JobSpec, names: Sequence[str]) -> dict[str, str]:
    """Cell → column of the table, for what templates need of one that has these columns.

    Raises UsageError where a template can't be read, or names what is neither a column nor in the matrix.
    """
    if spec.prompt.template_column is not None:
        return {"template": spec.prompt.template_column}
    if spec.prompt.template is None:
        return {}
    template = _parsed(spec.prompt.template)
    words, wanted = words_of(spec.matrix), dict[str, str]()
    for part in inner_parts(template):
        name = part.name if isinstance(part, Column) else part.perhaps_column if isinstance(part, Choice) else None
        if name in words and name in names:
            raise UsageError(f"matrix.{name}: the table has a column of this name, too; call one of them otherwise")
        if name is None or name in words:
            continue
        if name in names:
            wanted[f"{CELL}{name}"] = name
        elif isinstance(part, Column):
            known = ", ".join([*names, *words])
            raise UsageError(
                f"prompt.template: {{{name}}} is no column of the table and not in matrix; there is: {known}"
            )
    used = {part.name for part in inner_parts(template) if isinstance(part, Column)}
    used |= {part.perhaps_column or "" for part in inner_parts(template) if isinstance(part, Choice)}
    for name in words:
        if name not in used:
            raise UsageError(
                f"matrix.{name}: is no field of a request ({', '.join(MATRIX_FIELDS)}), and prompt.template does not "
                f"use {{{name}}}"
            )
    return wanted


def check_prompts(spec: JobSpec, wildcards: Wildcards, columns: Iterable[str]) -> None:
    """Raise UsageError where the spec's template names wildcards that are not there, or says too much of any row.

    ``columns`` are the cells that it reads, as :func:`template_columns` calls them.
    """
    ways = spec.prompt.samples
    if spec.prompt.template is not None:
        template = _parsed(spec.prompt.template)
        check_template(template, wildcards, "prompt.template")
        if spec.prompt.expansion == "all":
            names = [*(name.removeprefix(CELL) for name in columns if name.startswith(CELL)), *words_of(spec.matrix)]
            ways = count(template, Words(dict.fromkeys(names, "x"), wildcards))  # no column needs its stand-in
    if told := _too_many(ways, sum(1 for _ in combinations(spec.matrix))):
        raise UsageError(f"prompt.{'samples' if spec.prompt.expansion == 'sample' else 'template'}: {told}")


def _too_many(prompts: int, combined: int) -> str | None:
    """What to tell of a row that makes more than may be."""
    if prompts * combined <= _MOST_PROMPTS:
        return None
    number = f"{prompts:,}" if prompts < 10**15 else "more than 10^15"
    with_matrix = f" in {combined:,} combinations of the matrix" if combined > 1 else ""
    return f"makes {number} prompts of a row{with_matrix}; at most {_MOST_PROMPTS:,} are made"


def _parsed(text: str) -> Template:
    try:
        return parse(text)
    except BadTemplate as error:
        raise UsageError(f"prompt.template: {error}") from None


def images_a_row(spec: JobSpec, wildcards: Wildcards) -> int:
    """How many images a row makes, as far as that can be told without its cells."""
    if not spec.variants:  # slices of such jobs are what they were before there were variants
        return 1
    prompts = spec.prompt.samples
    if spec.prompt.expansion == "all" and spec.prompt.template is not None:
        prompts = min(count(_parsed(spec.prompt.template), Words({}, wildcards)), _MOST_PROMPTS)
    return prompts * sum(1 for _ in combinations(spec.matrix)) * spec.generate.num_images_per_prompt
