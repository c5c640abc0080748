"""The job spec as a whole: read, checked, its mistakes told in words."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from pydantic import AfterValidator, BaseModel, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails

from sdbatch.errors import Problem, SpecError
from sdbatch.spec.checks import Checks
from sdbatch.spec.generate import Generate
from sdbatch.spec.input import Input
from sdbatch.spec.matrix import MATRIX_FIELDS, Matrix, check_matrix, fields_of, odd_sizes_of, words_of
from sdbatch.spec.model import Model
from sdbatch.spec.notify import Notify
from sdbatch.spec.output import Output
from sdbatch.spec.plain_yaml import MOST_BYTES, read_yaml, told
from sdbatch.spec.prompt import Prompt
from sdbatch.spec.resources import Failures, Resources
from sdbatch.spec.section import Section
from sdbatch.spec.variables import filled_in, today
from sdbatch.spec.words import MOST_SHOWN, plain, shown, suggest

#: How to write what has a form of its own.
_FORMS = {
    "name": "use letters, digits, '.', '-', '_', at most 100, a letter or digit first",
    "license": "write its short name in lower case, as the Hub has it: cc-by-4.0, openrail++, other",
    "background": "write it as #rrggbb: #ffffff",
    "key_env": "name an environment variable: letters, digits, '_', no digit first",
}


class JobSpec(Section):
    """A job: rows of a prompt table in, pictures and metadata out."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = Field(
        description="Letters, digits, dot, dash, underscore"
    )
    input: Input
    prompt: Prompt = Field(default_factory=lambda: Prompt())
    matrix: Annotated[Matrix, AfterValidator(check_matrix)] = Field(
        default_factory=dict,
        description=f"Name → list of values, all combined with every prompt: {', '.join(MATRIX_FIELDS)}, or words of "
        "your own for the template",
    )
    model: Model = Field(default_factory=lambda: Model())
    generate: Generate = Field(default_factory=lambda: Generate(), validate_default=True)
    checks: Checks | None = Field(None, description="Checks on every picture, new seeds, the best of several")
    output: Output
    failures: Failures = Field(default_factory=lambda: Failures())
    resources: Resources = Field(default_factory=lambda: Resources())
    notify: Notify = Field(default_factory=lambda: Notify())

    @field_validator("matrix")
    @classmethod
    def _not_given_twice(cls, matrix: Matrix, info: ValidationInfo) -> Matrix:
        source, prompt = info.data.get("input"), info.data.get("prompt")
        if source is None or prompt is None:  # their own mistakes come first
            return matrix
        for name in fields_of(matrix):
            if name in source.columns:
                raise ValueError(f"varies {name}, which input.columns takes from the table; one of them can give it")
        for name in words_of(matrix):
            if name in source.kept:
                raise ValueError(f"has {name}, which input.keep takes from the table; call one of them otherwise")
            if not prompt.templated:
                fields = ", ".join(MATRIX_FIELDS)
                raise ValueError(f"has {name}, which is no field ({fields}), and there is no prompt.template to use it")
        return matrix

    @field_validator("generate")
    @classmethod
    def _sizes_of_the_matrix(cls, generate: Generate, info: ValidationInfo) -> Generate:
        for name, value in odd_sizes_of(info.data.get("matrix") or {}):
            if generate.round_size is None:
                raise ValueError(
                    f"lacks round_size: matrix.{name} holds {value}, and sizes are multiples of 8; change it, or set "
                    "generate.round_size to nearest, down or up"
                )
        return generate

    @field_validator("checks")
    @classmethod
    def _free_columns(cls, checks: Checks | None, info: ValidationInfo) -> Checks | None:
        source = info.data.get("input")
        if checks is not None and source is not None:
            for name in (*source.kept, *words_of(info.data.get("matrix") or {})):
                if name in checks.columns:
                    raise ValueError(
                        f"fill in the column {name}, which input.keep or the matrix has, too; rename that one"
                    )
        return checks

    @property
    def kept(self) -> list[str]:
        """The metadata's columns beside our own: those of the table and the words of the matrix."""
        return [*self.input.kept, *words_of(self.matrix)]

    @property
    def variants(self) -> bool:
        """Can a row have several prompts or settings? Then its images' ids tell which."""
        return self.prompt.samples > 1 or self.prompt.expansion == "all" or bool(self.matrix)

    def deciding(self) -> dict[str, Any]:
        """The part of the spec that decides what is made: a resumed job may not change it.

        Where things lie and who does the work may change; names of columns, numbers and weights may not.
        """
        fields = self.model_dump(mode="json")
        del fields["name"], fields["failures"], fields["notify"]
        for who in ("actors", "usd_per_gpu_hour", "budget_usd"):
            del fields["resources"][who]
        del fields["input"]["uri"], fields["output"]["uri"], fields["model"]["uri"], fields["model"]["tokenizer"]
        if self.prompt.templated:
            del fields["prompt"]["wildcards"]  # what its files hold counts
        else:  # specs that use no template and no matrix decide what they did before there were any
            fields["prompt"] = {"max_characters": self.prompt.max_characters}
        matrix = fields.pop("matrix")
        if matrix:
            fields["matrix"] = [[name, values] for name, values in matrix.items()]  # their order counts
        del fields["output"]["license"]
        for unused in ("renditions", "thumbnail"):
            if not fields["output"][unused]:
                del fields["output"][unused]
        if not self.output.image.lossless:
            del fields["output"]["image"]["lossless"]
        if fields["output"].pop("c2pa") is not None:
            fields["output"]["c2pa"] = True  # signed or not; certificates are renewed, keys lie where they lie
        for changes in ("fp8", "compile"):
            if not fields["model"][changes]:
                del fields["model"][changes]
        checks = fields.pop("checks")
        if checks is not None:  # their models count by their checksums
            for name in ("clip_score", "safety"):
                (checks[name] or {}).pop("model", None)
            fields["checks"] = checks
        for added in (*fields["model"]["loras"], *fields["model"]["embeddings"]):
            del added["uri"]  # what lies there counts, by its checksum
        return fields


def load_spec(path: str | Path, overrides: Sequence[str] = (), date: datetime.date | None = None) -> JobSpec:
    """Read a job spec from a YAML file; each override is ``field.path=value``, the value in YAML.

    Variables are filled in as of ``date``, today if there is none.

    Raises SpecError with every mistake at once.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise SpecError(str(path), [Problem("file", f"is no job spec: it has more than {MOST_BYTES:,} bytes")])
        raw = read_yaml(content.decode())
    except FileNotFoundError:
        raise SpecError(str(path), [Problem("file", f"{path.absolute()} does not exist")]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(str(path), [Problem("file", f"can't be read: {error}")]) from None
    except yaml.YAMLError as error:
        raise SpecError(str(path), [Problem("file", f"is not YAML that a job spec can hold: {told(error)}")]) from None
    if not isinstance(raw, dict):
        raise SpecError(str(path), [Problem("file", "should hold a mapping with name, input and output")])
    for override in overrides:
        _override(raw, override)
    raw, problems = filled_in(raw, date or today())
    try:
        spec = parse_spec(raw, str(path))
    except SpecError as error:
        raise SpecError(str(path), [*problems, *error.problems]) from None
    if problems:
        raise SpecError(str(path), problems)
    return spec


def overridden(spec: JobSpec, overrides: Sequence[str]) -> JobSpec:
    """The spec with ``field.path=value`` in place of what it said. Raises SpecError."""
    raw = spec.model_dump(mode="json")
    for override in overrides:
        _override(raw, override)
    return parse_spec(raw, "--set")


def parse_spec(raw: Mapping[str, Any], source: str = "job spec") -> JobSpec:
    """Check a spec that is already a mapping; raises SpecError with every mistake at once."""
    try:
        return JobSpec.model_validate(raw)
    except ValidationError as error:
        raise SpecError(
            source, [_problem(details) for details in error.errors(include_url=False)[:_MOST_PROBLEMS]]
        ) from None


def _override(raw: dict[str, Any], override: str) -> None:
    field, equals, value = override.partition("=")
    keys = field.strip().split(".")
    if not equals or not all(keys):
        raise SpecError("--set", [Problem(plain(override), "should read field.path=value, as in generate.seed=7")])
    section: Any = raw
    for key in keys[:-1]:
        section[key] = {} if section.get(key) is None else section[key]
        section = section[key]
        if not isinstance(section, dict):
            raise SpecError("--set", [Problem(plain(field), f"{shown(key)} is a value, it has no fields")])
    try:
        section[keys[-1]] = read_yaml(value)
    except yaml.YAMLError as error:
        wrong = f"the value {shown(value)} is not YAML that a job spec can hold: {told(error)}"
        raise SpecError("--set", [Problem(plain(field), wrong)]) from None


# -- from pydantic's errors to words --------------------------------------------------------------------------


#: Mistakes that are told at once.
_MOST_PROBLEMS = 100


def _problem(details: ErrorDetails) -> Problem:
    place = [str(part) for part in details["loc"] if not re.match(r"(list|dict)\[", str(part))]
    field = plain(".".join(place))
    kind, given = details["type"], shown(details.get("input"))
    if kind == "extra_forbidden":
        return Problem(field, "no such field", suggest(place[-1], _fields_at(place[:-1])))
    if kind == "missing":
        return Problem(field, "is required")
    if kind == "literal_error":
        expected = re.findall(r"'([^']*)'", str(details.get("ctx", {}).get("expected", "")))
        return Problem(field, f"is {given}", suggest(str(details.get("input"))[:MOST_SHOWN], expected))
    if kind == "string_pattern_mismatch":
        return Problem(field, f"is {given}", _FORMS[field.rpartition(".")[2]])
    if kind == "model_type":
        return Problem(field, f"is {given}; should be a section", "{} takes all of its fields as they are")
    if kind == "value_error":
        return Problem(field, details["msg"].removeprefix("Value error, "))
    message = details["msg"][:1].lower() + details["msg"][1:]
    return Problem(field, f"is {given}; {message.replace('input ', '')}")


def _fields_at(place: Sequence[str]) -> list[str]:
    """The field names that a section of the spec has."""
    model: type[BaseModel] = JobSpec
    for part in place:
        if part.isdigit():  # an element of a list, whose section was found already
            continue
        annotation = model.model_fields[part].annotation
        inner = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
        sections = [kind for kind in inner if issubclass(kind, BaseModel)]
        if not sections:
            return []
        model = sections[0]
    return list(model.model_fields)
