"""The job spec: defaults, overrides, and every mistake at once."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from sdbatch.diffusion import SAMPLERS
from sdbatch.errors import SpecError
from sdbatch.spec import JobSpec, SamplerName, load_spec, parse_spec

SMALLEST = {"name": "a", "input": {"uri": "p.csv"}, "output": {"uri": "out"}}


def problems(raw: dict) -> dict[str, str]:
    with pytest.raises(SpecError) as caught:
        parse_spec(raw)
    return {problem.field: f"{problem.message} {problem.hint}" for problem in caught.value.problems}


def test_the_smallest_spec_has_defaults_for_the_rest() -> None:
    spec = parse_spec(SMALLEST)
    assert spec.model.uri == "builtin:shapes"
    assert spec.input.prompt_column == "prompt"
    assert spec.output.format == "images"


def test_every_mistake_is_reported_at_once_with_its_field() -> None:
    found = problems(
        {
            "name": "has blanks",
            "input": {"url": "p.csv", "columns": {"promt": "P"}},
            "generate": {"sampler": "dpmpp2m", "num_inference_steps": 0, "guidance_scale": "much"},
            "ouput": {},
        }
    )
    assert set(found) == {
        "name",
        "input.uri",
        "input.url",
        "input.columns",
        "generate.sampler",
        "generate.num_inference_steps",
        "generate.guidance_scale",
        "output",
        "ouput",
    }
    assert "did you mean 'uri'?" in found["input.url"]
    assert "did you mean 'output'?" in found["ouput"]
    assert "did you mean 'dpmpp_2m'?" in found["generate.sampler"]
    assert "did you mean 'prompt'?" in found["input.columns"]
    assert "is required" in found["output"]


@pytest.mark.parametrize("keep", [["seed"], {"sha256": "x"}, ["a", "a"]])
def test_kept_columns_may_not_clash(keep: object) -> None:
    assert "input.keep" in problems({**SMALLEST, "input": {"uri": "p.csv", "keep": keep}})


def test_overrides_reach_into_sections(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("name: a\ninput: {uri: p.csv}\noutput: {uri: out}\n")
    spec = load_spec(path, ["generate.seed=9", "resources.actors=3", "input.keep=[a, b]"])
    assert (spec.generate.seed, spec.resources.actors, spec.input.keep) == (9, 3, ["a", "b"])
    with pytest.raises(SpecError, match=r"should read field\.path=value"):
        load_spec(path, ["generate.seed"])
    with pytest.raises(SpecError, match="'name' is a value"):
        load_spec(path, ["name.x=1"])


@pytest.mark.parametrize("text", ["name: [", "- 1\n- 2", "", "!!python/object/apply:os.system ['true']"])
def test_what_is_no_spec_is_refused_without_running_anything(text: str, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(SpecError):
        load_spec(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"nothing\.yaml does not exist"):
        load_spec(tmp_path / "nothing.yaml")


def test_the_spec_offers_the_samplers_that_the_model_has() -> None:
    assert set(get_args(SamplerName)) == set(SAMPLERS)


def test_every_field_of_the_schema_is_described_or_is_a_section() -> None:
    schema = JobSpec.model_json_schema()
    for name, section in schema["$defs"].items():
        for field, content in section["properties"].items():
            assert "description" in content or "$ref" in content, f"{name}.{field} has no description"


def test_what_has_a_form_of_its_own_is_told_with_that_form() -> None:
    output = {
        "uri": "out",
        "license": "CC BY",
        "c2pa": {"certificate": "x.pem", "key_env": "1"},
        "renditions": {"small": {"size": "8x8", "background": "#fff"}},
    }
    told = problems({**SMALLEST, "name": "a b", "output": output})
    assert "as the Hub has it: cc-by-4.0" in told["output.license"]
    assert "write it as #rrggbb" in told["output.renditions.small.background"]
    assert "name an environment variable" in told["output.c2pa.key_env"]
    assert "use letters, digits, '.', '-', '_'" in told["name"]
    assert str(JobSpec.model_json_schema()).count("'pattern': ") == len(told) == 4


def test_where_things_lie_does_not_decide_what_is_made() -> None:
    one = parse_spec(SMALLEST).deciding()
    moved = {
        "name": "b",
        "input": {"uri": "elsewhere/p.csv"},
        "output": {"uri": "s3://b/o"},
        "resources": {"actors": 9},
    }
    assert parse_spec(moved).deciding() == one
    assert parse_spec({**SMALLEST, "generate": {"seed": 1}}).deciding() != one
    assert parse_spec({**SMALLEST, "resources": {"batch_size": 2}}).deciding() != one


def test_outputs_that_use_nothing_new_are_decided_as_before() -> None:
    decided = {"format": "images", "image": {"type": "png", "quality": 90}, "shard_size": 64}
    assert parse_spec(SMALLEST).deciding()["output"] == decided
    assert parse_spec({**SMALLEST, "output": {"uri": "out", "license": "cc0-1.0"}}).deciding()["output"] == decided
    lossless = {"uri": "out", "image": {"type": "webp", "lossless": True}}
    assert parse_spec({**SMALLEST, "output": lossless}).deciding()["output"]["image"]["lossless"] is True


@pytest.mark.parametrize(
    ("output", "field", "message"),
    [
        ({"image": {"type": "jpeg", "lossless": True}}, "output.image", "jpeg has no lossless form; set type: webp"),
        ({"image": {"lossless": True}}, "output.image", "png is lossless as it is"),
        ({"license": "All rights reserved"}, "output.license", ""),
    ],
)
def test_mistakes_in_the_output_are_told_before_any_work(output: dict, field: str, message: str) -> None:
    assert message in problems({**SMALLEST, "output": {"uri": "out", **output}})[field]


def test_a_size_of_no_whole_cells_is_told_with_those_beside_it() -> None:
    told = problems({**SMALLEST, "generate": {"width": 100}})
    assert "has width 100; sizes are multiples of 8: 96 or 104, or set round_size" in told["generate"]
    assert parse_spec({**SMALLEST, "generate": {"width": 100, "round_size": "up"}}).generate.width == 100
