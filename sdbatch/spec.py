"""The job spec: what a person writes to have pictures made."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from sdbatch.errors import Problem, SpecError

SamplerName = Literal[
    "ddpm",
    "ddim",
    "plms",
    "euler",
    "euler_karras",
    "euler_exponential",
    "euler_ancestral",
    "heun",
    "heun_karras",
    "heun_exponential",
    "dpmpp_2m",
    "dpmpp_2m_karras",
    "dpmpp_2m_exponential",
    "dpmpp_2m_sde",
    "dpmpp_2m_sde_karras",
    "dpmpp_2m_sde_exponential",
    "dpmpp_sde",
    "dpmpp_sde_karras",
    "dpmpp_sde_exponential",
    "unipc",
    "unipc_karras",
    "unipc_exponential",
    "lcm",
]

#: Fields of an image request that a column of the table may give, row by row.
MAPPABLE = (
    "id",
    "prompt",
    "negative_prompt",
    "seed",
    "width",
    "height",
    "num_inference_steps",
    "guidance_scale",
    "sampler",
    "num_images_per_prompt",
    "init_image",
    "mask_image",
    "strength",
)

#: Columns of the metadata table; a user's column can't be kept under one of these names.
METADATA_COLUMNS = (
    "image_id",
    "row_id",
    "shard",
    "prompt",
    "template",
    "negative_prompt",
    "seed",
    "width",
    "height",
    "num_inference_steps",
    "guidance_scale",
    "sampler",
    "init_image",
    "mask_image",
    "strength",
    "truncated",
    "model",
    "model_sha256",
    "path",
    "file_name",
    "bytes",
    "sha256",
    "status",
    "error",
    "image",
)


def _without_credentials(uri: str) -> str:
    if re.match(r"[^/@]*://[^/]*@", uri):
        raise ValueError("holds credentials, which don't belong in a job spec; give them by the environment")
    return uri


Uri = Annotated[str, Field(min_length=1), AfterValidator(_without_credentials)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Input(Section):
    """The prompt table."""

    uri: Uri = Field(description="A file, a folder or a glob; local or s3://")
    format: Literal["parquet", "csv", "tsv", "jsonl", "text"] | None = Field(
        None, description="Told by the file's ending when left out"
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description=f"Field → column of the table; fields: {', '.join(MAPPABLE)}"
    )
    keep: list[str] | dict[str, str] = Field(
        default_factory=list, description="Columns carried into the metadata: a list, or new name → column"
    )
    limit: int | None = Field(None, ge=1, description="Use only this many rows, from the top")

    @field_validator("columns")
    @classmethod
    def _known_fields(cls, columns: dict[str, str]) -> dict[str, str]:
        for name in columns:
            if name not in MAPPABLE:
                raise ValueError(f"'{name}' is no field that a column can give; {_suggest(name, MAPPABLE)}")
        return columns

    @field_validator("keep")
    @classmethod
    def _free_names(cls, keep: list[str] | dict[str, str]) -> list[str] | dict[str, str]:
        names = list(keep)
        for name in names:
            if name in METADATA_COLUMNS:
                raise ValueError(
                    f"'{name}' is a metadata column of sdbatch; keep yours under another name, "
                    f"such as keep: {{my_{name}: {name}}}"
                )
        if len(set(names)) < len(names):
            raise ValueError("names a column twice")
        return keep

    @property
    def kept(self) -> dict[str, str]:
        """Name in the metadata → column of the table."""
        return self.keep if isinstance(self.keep, dict) else {name: name for name in self.keep}

    @property
    def prompt_column(self) -> str:
        return self.columns.get("prompt", "prompt")


class Prompt(Section):
    """How rows become prompts."""

    max_characters: int = Field(4000, ge=1, description="A row with a longer prompt is quarantined")


class Lora(Section):
    """Low-rank changes to the model's weights."""

    uri: Uri = Field(description="A .safetensors file, local or s3://")
    weight: float = Field(1.0, allow_inf_nan=False, description="How strongly; several add up")


class LearntWord(Section):
    """A textual inversion: vectors that a word of the prompt stands for."""

    uri: Uri = Field(description="A .safetensors file, local or s3://")
    token: str | None = Field(None, min_length=1, description="The word; what the file calls it when left out")


class Model(Section):
    """The checkpoint that makes the pictures."""

    uri: Uri = Field(
        "builtin:shapes",
        description="builtin:shapes, builtin:null (no network), hf:OWNER/NAME[@REVISION][/FILE], or a folder in the "
        "diffusers layout or a single .safetensors file, local or s3://",
    )
    dtype: Literal["float32", "float16", "bfloat16"] = Field("float32", description="Number format of the weights")
    tokenizer: Uri | None = Field(
        None, description="A folder with vocab.json and merges.txt, for single files, which bring none"
    )
    prediction_type: Literal["epsilon", "v_prediction"] | None = Field(
        None, description="What the network predicts, where the checkpoint can't tell or is wrong"
    )
    timestep_spacing: Literal["leading", "trailing", "linspace"] | None = Field(
        None, description="How steps are spread over the time steps, where the checkpoint can't tell or is wrong"
    )
    loras: list[Lora] = Field(default_factory=list, description="LoRAs to merge into the weights")
    embeddings: list[LearntWord] = Field(default_factory=list, description="Textual inversions")
    vae_tiling: bool = Field(False, description="Decode large pictures tile by tile: less memory, soft seams")
    vae_slicing: bool = Field(False, description="Decode a batch picture by picture: less memory")
    offload_text_encoders: bool = Field(False, description="Keep text encoders on the GPU only while they encode")

    @property
    def name(self) -> str:
        """What results call the model: wherever its folder lies, the same."""
        return self.uri if self.uri.startswith("builtin:") else self.uri.rstrip("/").rpartition("/")[2]


class Generate(Section):
    """Defaults for every image request; a mapped column overrides them row by row."""

    num_images_per_prompt: int = Field(1, ge=1, le=10_000, description="Pictures a row, each with a seed of its own")
    num_inference_steps: int = Field(20, ge=1, le=1000, description="Denoising steps")
    guidance_scale: float = Field(5.0, ge=0, allow_inf_nan=False, description="Classifier-free guidance; ≤ 1: none")
    negative_prompt: str = Field("", description="What pictures should not show")
    sampler: SamplerName = Field("dpmpp_2m", description="How noise becomes a latent")
    eta: float = Field(0.0, ge=0, le=1, description="Noise of the sampler ddim: 0 none, 1 as much as ddpm")
    guidance_rescale: float = Field(
        0.0, ge=0, le=1, description="Pulls contrast back that guidance adds; 0.7 for models with zero terminal SNR"
    )
    guidance_interval: tuple[float, float] = Field(
        (0.0, 1.0), description="Guidance acts between these shares of the way from noise (0) to picture (1)"
    )
    clip_skip: int = Field(0, ge=0, le=12, description="Layers to leave out at the text encoder's end; UIs add 1")
    long_prompts: Literal["truncate", "chunk"] = Field(
        "truncate", description="A prompt beyond what the text encoder reads at once: cut it, or read it in chunks"
    )
    emphasis: bool = Field(False, description="Read (word:1.2), (word) and [word] in prompts as weights")
    strength: float = Field(0.8, gt=0, le=1, description="How much of an init_image is made anew")
    seed: int = Field(0, ge=0, lt=2**63, description="Every image's seed is derived from this one and its row's id")
    width: int | None = Field(None, gt=0, le=16384, description="Pixels; the model's own size when left out")
    height: int | None = Field(None, gt=0, le=16384, description="Pixels; the model's own size when left out")
    round_size: Literal["nearest", "down", "up"] | None = Field(
        None, description="Round sizes that are no multiple of 8; left out, they are an error"
    )

    @field_validator("guidance_interval")
    @classmethod
    def _ascending(cls, interval: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError("should be two numbers between 0 and 1, the smaller one first")
        return interval


class Picture(Section):
    """How a picture is encoded."""

    type: Literal["png", "jpeg", "webp"] = Field("png", description="File format")
    quality: int = Field(90, ge=1, le=100, description="Of jpeg and webp")


class Output(Section):
    """Where pictures and metadata go."""

    uri: Uri = Field(description="A folder or s3://bucket/prefix")
    format: Literal["images", "webdataset", "parquet"] = Field("images", description="Form of the shards")
    image: Picture = Field(default_factory=lambda: Picture())
    shard_size: int = Field(64, ge=1, le=100_000, description="Images a shard: the unit of work and of commit")


class Failures(Section):
    """When to give up."""

    max_failed_fraction: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Stop when more than this fraction of the planned images (and more than 10) failed while being "
        "made. Rows refused at plan time do not count",
    )
    max_attempts: int = Field(
        2,
        ge=1,
        le=100,
        description="Times a request is tried that kills its process, once it is alone under suspicion; then it is "
        "quarantined",
    )


_MOST_ACTORS = 10_000


class Resources(Section):
    """The pool that does the work."""

    actors: int | str = Field(
        1, description="Generator actors, each with the whole model: 4, or 2..16 for as many as there is room for"
    )
    gpus_per_actor: float = Field(0, ge=0, le=8, description="0: on the CPU")
    cpus_per_actor: int = Field(1, ge=1, le=256, description="CPUs, and threads of the model when it runs there")
    batch_size: int = Field(8, ge=1, le=1024, description="Images that the model computes at once")

    @field_validator("actors", mode="before")
    @classmethod
    def _number_or_range(cls, actors: Any) -> int | str:
        known = re.fullmatch(r"([0-9]{1,5})(?:\.\.([0-9]{1,5}))?", str(actors)) if type(actors) in {int, str} else None
        if known is None or not 1 <= int(known[1]) <= int(known[2] or known[1]) <= _MOST_ACTORS:
            raise ValueError(f"should be a number or a range from 1 to {_MOST_ACTORS:,}: write 4 or 2..16")
        return int(actors) if known[2] is None else str(actors)

    @property
    def fewest(self) -> int:
        """Actors that should find room."""
        return int(str(self.actors).partition("..")[0])

    @property
    def most(self) -> int:
        """Actors that are asked for."""
        return int(str(self.actors).rpartition("..")[2])

    @property
    def device(self) -> str:
        return "cuda" if self.gpus_per_actor > 0 else "cpu"


class JobSpec(Section):
    """A job: rows of a prompt table in, pictures and metadata out."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = Field(
        description="Letters, digits, dot, dash, underscore"
    )
    input: Input
    prompt: Prompt = Field(default_factory=lambda: Prompt())
    model: Model = Field(default_factory=lambda: Model())
    generate: Generate = Field(default_factory=lambda: Generate())
    output: Output
    failures: Failures = Field(default_factory=lambda: Failures())
    resources: Resources = Field(default_factory=lambda: Resources())

    def deciding(self) -> dict[str, Any]:
        """The part of the spec that decides what is made: a resumed job may not change it.

        Where things lie and who does the work may change; names of columns, numbers and weights may not.
        """
        fields = self.model_dump(mode="json")
        del fields["name"], fields["failures"], fields["resources"]["actors"]
        del fields["input"]["uri"], fields["output"]["uri"], fields["model"]["uri"], fields["model"]["tokenizer"]
        for added in (*fields["model"]["loras"], *fields["model"]["embeddings"]):
            del added["uri"]  # what lies there counts, by its checksum
        return fields


def load_spec(path: str | Path, overrides: Sequence[str] = ()) -> JobSpec:
    """Read a job spec from a YAML file; each override is ``field.path=value``, the value in YAML.

    Raises SpecError with every mistake at once.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise SpecError(str(path), [Problem("file", f"is no job spec: it has more than {_MOST_BYTES:,} bytes")])
        raw = _read_yaml(content.decode())
    except FileNotFoundError:
        raise SpecError(str(path), [Problem("file", f"{path.absolute()} does not exist")]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(str(path), [Problem("file", f"can't be read: {error}")]) from None
    except yaml.YAMLError as error:
        raise SpecError(str(path), [Problem("file", f"is not YAML that a job spec can hold: {_told(error)}")]) from None
    if not isinstance(raw, dict):
        raise SpecError(str(path), [Problem("file", "should hold a mapping with name, input and output")])
    for override in overrides:
        _override(raw, override)
    return parse_spec(raw, str(path))


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
        raise SpecError("--set", [Problem(_plain(override), "should read field.path=value, as in generate.seed=7")])
    section: Any = raw
    for key in keys[:-1]:
        section[key] = {} if section.get(key) is None else section[key]
        section = section[key]
        if not isinstance(section, dict):
            raise SpecError("--set", [Problem(_plain(field), f"{_shown(key)} is a value, it has no fields")])
    try:
        section[keys[-1]] = _read_yaml(value)
    except yaml.YAMLError as error:
        told = f"the value {_shown(value)} is not YAML that a job spec can hold: {_told(error)}"
        raise SpecError("--set", [Problem(_plain(field), told)]) from None


# -- YAML -----------------------------------------------------------------------------------------------------

#: No job spec is longer, deeper, or has more parts once its aliases are written out.
_MOST_BYTES = 100_000
_MOST_DEPTH = 20
_MOST_PARTS = 20_000


class _SpecLoader(yaml.SafeLoader):
    """Plain data of bounded size. What YAML would pass over in silence is refused: keys that are there twice."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._parts = 0
        self._parts_of: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next part. What an alias stands for counts every time."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        before, mark = self._parts, event.start_mark
        if self._depth == _MOST_DEPTH:
            raise ComposerError(None, None, f"is nested more than {_MOST_DEPTH} levels deep", mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is None:
            return None
        if not isinstance(event, yaml.AliasEvent):
            self._parts += 1
            self._parts_of[node] = self._parts - before
        elif node in self._parts_of:
            self._parts += self._parts_of[node]
        else:
            raise ComposerError(None, None, f"{_shown(event.anchor)} is a part of itself", mark)
        if self._parts > _MOST_PARTS:
            raise ComposerError(None, None, f"has more than {_MOST_PARTS:,} parts", mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        key: Any
        for key, _ in node.value:
            if key.tag not in _KEY_TAGS:
                told = f"the key {_shown(key.value)} is no text; put it in quotes"
                raise ComposerError(None, None, told, key.start_mark)
            if key.value in seen:
                raise ComposerError(None, None, f"the key {_shown(key.value)} is there twice", key.start_mark)
            seen.add(key.value)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (AttributeError, LookupError, ValueError):  # what an impossible date, or number, makes the library raise
            told = f"{_shown(node.value)} is no {_shown(node.tag.rpartition(':')[2])}"
            raise ConstructorError(None, None, told, node.start_mark) from None


_KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


def _read_yaml(text: str) -> Any:
    """The one document in ``text``. Raises YAMLError."""
    return yaml.load(text, _SpecLoader)  # noqa: S506 (it is a SafeLoader)


def _told(error: yaml.YAMLError) -> str:
    """What is wrong, and where."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{_plain(str(error.problem))}, in line {mark.line + 1}, column {mark.column + 1}"
    return " ".join(str(error).split())


def _shown(value: Any) -> str:
    """What was given, short and harmless on a terminal."""
    if isinstance(value, int) and abs(value) >= 10**_MOST_SHOWN:
        return f"a number of more than {_MOST_SHOWN} digits"
    if isinstance(value, str):
        return repr(value if len(value) <= _MOST_SHOWN else f"{value[:_MOST_SHOWN]}…")
    return repr(value) if isinstance(value, int | float | None) else type(value).__name__


def _plain(text: str) -> str:
    """Text of our own with something of the user's in it, likewise."""
    return "".join(char if char.isprintable() else "�" for char in text[: 2 * _MOST_SHOWN])


_MOST_SHOWN = 100
#: Mistakes that are told at once.
_MOST_PROBLEMS = 100


# -- from pydantic's errors to words --------------------------------------------------------------------------


def _problem(details: ErrorDetails) -> Problem:
    place = [str(part) for part in details["loc"] if not re.match(r"(list|dict)\[", str(part))]
    field = _plain(".".join(place))
    kind, given = details["type"], _shown(details.get("input"))
    if kind == "extra_forbidden":
        return Problem(field, "no such field", _suggest(place[-1], _fields_at(place[:-1])))
    if kind == "missing":
        return Problem(field, "is required")
    if kind == "literal_error":
        expected = re.findall(r"'([^']*)'", str(details.get("ctx", {}).get("expected", "")))
        return Problem(field, f"is {given}", _suggest(str(details.get("input"))[:_MOST_SHOWN], expected))
    if kind == "string_pattern_mismatch":
        return Problem(field, f"is {given}", "use letters, digits, '.', '-', '_', at most 100, a letter or digit first")
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


def _suggest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"there is: {', '.join(known)}"
