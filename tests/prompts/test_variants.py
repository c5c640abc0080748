"""What becomes of a row under templates and a matrix: its images, their ids, seeds and words."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdbatch.errors import SpecError, UsageError
from sdbatch.prompts import (
    ImageRequest,
    ModelFacts,
    RowIds,
    check_prompts,
    from_table,
    images_a_row,
    odd_sizes,
    requests_of_slice,
    template_columns,
    to_table,
)
from sdbatch.spec import JobSpec, parse_spec


def spec(**sections: Any) -> JobSpec:
    return parse_spec({"name": "t", "input": {"uri": "p.csv"}, "output": {"uri": "out"}, **sections})


def planned(job: JobSpec, *rows: dict[str, str], first: int = 0) -> list[ImageRequest]:
    cells = [{f"word:{name}": cell for name, cell in row.items()} for row in rows]
    return list(requests_of_slice(cells, first, job, ModelFacts((64, 64)), RowIds(False)))


def test_a_matrix_is_combined_with_every_prompt_and_shares_its_seeds() -> None:
    job = spec(
        prompt={"template": "a {style} {what}"},
        matrix={"style": ["flat", "shaded"], "size": ["64x64", "96x64"]},
        generate={"num_images_per_prompt": 2},
    )
    found = planned(job, {"what": "cat"})
    told = [(request.image_id, request.prompt, request.width, request.kept["style"]) for request in found]
    assert told == [
        ("00000000-0-0", "a flat cat", 64, "flat"),
        ("00000000-0-1", "a flat cat", 64, "flat"),
        ("00000000-1-0", "a flat cat", 96, "flat"),
        ("00000000-1-1", "a flat cat", 96, "flat"),
        ("00000000-2-0", "a shaded cat", 64, "shaded"),
        ("00000000-2-1", "a shaded cat", 64, "shaded"),
        ("00000000-3-0", "a shaded cat", 96, "shaded"),
        ("00000000-3-1", "a shaded cat", 96, "shaded"),
    ]
    assert [request.seed for request in found] == [found[0].seed, found[1].seed] * 4
    assert {request.template for request in found} == {"a {style} {what}"}


def test_prompts_of_one_row_have_seeds_of_their_own() -> None:
    job = spec(prompt={"template": "{a|b|c} {what}", "expansion": "all"}, generate={"num_images_per_prompt": 2})
    found = planned(job, {"what": "cat"})
    assert [request.prompt for request in found[::2]] == ["a cat", "b cat", "c cat"]
    assert len({request.seed for request in found}) == len({request.image_id for request in found}) == 6


def test_a_template_alone_leaves_ids_and_seeds_as_they_are_without_one() -> None:
    plain = list(requests_of_slice([{"prompt": "a cat"}], 0, spec(), ModelFacts((64, 64)), RowIds(False)))
    made = planned(spec(prompt={"template": "a {what}"}), {"what": "cat"})
    assert [(r.image_id, r.seed, r.prompt) for r in made] == [(r.image_id, r.seed, r.prompt) for r in plain]


@given(st.lists(st.text(min_size=1, max_size=5), min_size=2, max_size=8), st.data())
def test_a_row_is_drawn_the_same_wherever_slices_are_cut(cells: list[str], data: st.DataObject) -> None:
    job = spec(prompt={"template": "{a|b|c|d} {what} {2$$x|y|z}", "samples": 3, "wildcard_seed": 5})
    rows = [{"what": cell} for cell in cells]
    at = data.draw(st.integers(1, len(rows) - 1))
    whole = planned(job, *rows)
    assert whole == planned(job, *rows[:at]) + planned(job, *rows[at:], first=at)


def test_the_wildcard_seed_is_not_the_seed_of_pictures() -> None:
    def made(wildcard_seed: int, seed: int) -> list[ImageRequest]:
        job = spec(prompt={"template": "{a|b|c|d|e|f|g|h}", "wildcard_seed": wildcard_seed}, generate={"seed": seed})
        return planned(job, *[{}] * 8)

    assert [r.prompt for r in made(1, 1)] == [r.prompt for r in made(1, 2)] != [r.prompt for r in made(2, 1)]
    assert [r.seed for r in made(1, 1)] == [r.seed for r in made(2, 1)] != [r.seed for r in made(1, 2)]


def test_each_row_may_have_a_template_of_its_own() -> None:
    job = spec(
        input={"uri": "p.csv", "keep": ["what"]}, prompt={"template_column": "t", "expansion": "all"}, matrix={"w": [1]}
    )
    rows = [
        {"template": "{a|b} {what} {w}", "keep:what": "cat"},
        {"template": "{a", "keep:what": "cat"},
        {"template": "{nothing}", "keep:what": "cat"},
        {"template": "{what}", "keep:what": ""},
        {"template": "{a|b|c|d|e|f|g|h|i|j}" * 5, "keep:what": ""},
        {"template": None, "keep:what": ""},
        {"template": "{a|b|c|d|e|f|g|h|i|j}" * 4 + "{what}" * 10, "keep:what": "x" * 10_000},
        {"template": "{1$$a|b}" * 1_000_000, "keep:what": ""},
    ]
    found = list(requests_of_slice(rows, 0, job, ModelFacts((64, 64)), RowIds(False)))
    assert [request.prompt for request in found[:2]] == ["a cat 1", "b cat 1"]
    assert [request.fault for request in found[2:]] == [
        "row 2: its template can't be read: the '{' at character 1 is not closed; write \\{ for the character itself",
        "row 3: its template names {nothing}, which neither input.keep nor matrix gives",
        "row 4: its template needs {what}, and the row has nothing there",
        "row 5: its template makes 100,000 prompts of a row; at most 10,000 are made",
        "row 6: the prompt is empty",
        "row 7: its template makes 10,000 prompts of up to 100,012 characters",
        "row 8: its template has 8,000,000 characters; at most 20,000 are read",
    ]


def test_braces_of_a_prompt_column_stay_what_they_are() -> None:
    (found,) = requests_of_slice([{"prompt": "{a|b} __c__"}], 0, spec(), ModelFacts((64, 64)), RowIds(False))
    assert (found.prompt, found.template) == ("{a|b} __c__", None)


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"prompt": {"template": "a {colour}"}}, r"prompt.template: \{colour\} is no column .* there is: what"),
        ({"prompt": {"template": "a {what"}}, "prompt.template: the '{' at character 3 is not closed"),
        ({"prompt": {"template": "{what}"}, "matrix": {"style": ["a"]}}, "matrix.style: is no field of a request"),
        ({"prompt": {"template": "{what}"}, "matrix": {"what": ["a"]}}, "matrix.what: the table has a column of this"),
    ],
)
def test_mistakes_are_told_before_anything_is_read(sections: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        template_columns(spec(**sections), ["what"])


def test_what_a_row_makes_is_known_beforehand_and_leaves_the_slices_of_other_jobs_alone() -> None:
    assert images_a_row(spec(generate={"num_images_per_prompt": 1000}), {}) == 1
    assert images_a_row(spec(prompt={"template": "{a|b}" * 10, "expansion": "all"}), {}) == 1024
    prompt, matrix = {"template": "a", "samples": 5}, {"seed": [1, 2]}
    assert images_a_row(spec(prompt=prompt, matrix=matrix, generate={"num_images_per_prompt": 2}), {}) == 20


def test_no_id_is_anothers_whatever_rows_are_called() -> None:
    columns = {"uri": "p.csv", "columns": {"id": "i"}}
    job = spec(input=columns, matrix={"seed": [1, 2]}, generate={"num_images_per_prompt": 2})
    rows = [{"id": name, "prompt": "cat"} for name in ("a", "a-0", "a-1-0", "a-1")]
    rows += [{"id": name, "prompt": ""} for name in ("a-0-0", "a-1-1", "b")]
    found = list(requests_of_slice(rows, 0, job, ModelFacts((64, 64)), RowIds(True)))
    assert len(found) == 4 * 4 + 3  # a row that can't be made at all is one fault
    assert len({request.image_id for request in found}) == len(found)


def test_a_combination_that_can_not_be_made_leaves_the_others() -> None:
    job = spec(matrix={"sampler": ["ddim", "lcm"], "num_inference_steps": [4, 80]})
    facts = ModelFacts((64, 64), most_steps={"lcm": 50})
    found = list(requests_of_slice([{"prompt": "a cat"}], 0, job, facts, RowIds(False)))
    assert [request.image_id for request in found] == [f"00000000-{number}-0" for number in range(4)]
    refused = "row 1: num_inference_steps is 80; lcm takes at most 50"
    assert [request.fault for request in found] == [None, None, None, refused]


def test_a_size_that_can_not_be_drawn_is_found_in_any_combination() -> None:
    job = spec(matrix={"width": [64, 72]}, input={"uri": "p.csv", "columns": {"height": "h"}})
    rows = [{"prompt": "a"}, {"prompt": "b", "height": "9"}]
    made = requests_of_slice(rows, 0, job, ModelFacts((64, 64)), RowIds(False))
    assert [(odd.row, odd.width, odd.height) for odd in odd_sizes(made, 0)] == [(1, 64, 9)]


def test_the_plan_and_what_decides_it_are_as_they_were_where_nothing_of_this_is_used() -> None:
    assert spec().deciding()["prompt"] == {"max_characters": 4000}
    assert "matrix" not in spec().deciding()
    assert "template" not in to_table([], []).column_names
    job = spec(prompt={"template": "{w}"}, matrix={"w": ["a", "b"]})
    table = to_table(planned(job, {}), job.kept, templated=True)
    assert from_table(table) == planned(job, {})
    assert table.column("template").to_pylist() == ["{w}", "{w}"]


def test_the_order_of_the_matrix_decides_too() -> None:
    one = spec(matrix={"seed": [1], "guidance_scale": [2]}).deciding()
    assert one != spec(matrix={"guidance_scale": [2], "seed": [1]}).deciding()
    assert one != spec(matrix={"seed": [1], "guidance_scale": [2, 3]}).deciding()


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"matrix": {"guidence_scale": [1]}}, "guidence_scale, which is no field"),
        ({"matrix": {"eta": [0, 1]}}, "eta is the same for all images of a job"),
        ({"matrix": {"sampler": ["magic"]}}, "sampler 'magic': should be 'ddpm'"),
        ({"matrix": {"seed": []}}, "seed has no values"),
        ({"matrix": {"seed": [1, 1]}}, "seed has a value twice"),
        ({"matrix": {"size": ["large"]}}, "size 'large' should read like 768x512"),
        ({"matrix": {"size": ["64x64"], "width": [64]}}, "has both size and width or height"),
        ({"matrix": {"size": ["64x65"]}}, "matrix.size holds 64x65, and sizes are multiples of 8"),
        ({"matrix": {"seed": list(range(101)), "guidance_scale": list(range(100))}}, "more than 10,000 combinations"),
        ({"matrix": {"seed": [True]}}, "matrix.seed"),
        ({"matrix": {"sha256": ["a"]}, "prompt": {"template": "a"}}, "sha256 is a metadata column"),
        ({"matrix": {"seed": [1]}, "input": {"uri": "p", "columns": {"seed": "s"}}}, "input.columns takes from"),
        ({"prompt": {"samples": 2}}, "has samples, which only templates take"),
        ({"prompt": {"wildcards": "w"}}, "has wildcards, which only templates take"),
        ({"prompt": {"template": "a", "template_column": "t"}}, "both template and template_column"),
        ({"prompt": {"template": "a", "expansion": "some"}}, "prompt.expansion: is 'some'"),
        ({"prompt": {"template": "a", "wildcard_seed": -1}}, "prompt.wildcard_seed: is -1"),
    ],
)
def test_a_spec_that_can_not_be_says_why(sections: dict[str, Any], told: str) -> None:
    with pytest.raises(SpecError) as caught:
        spec(**sections)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"prompt": {"template": "{a|b}" * 60, "expansion": "all"}}, "more than 10^15 prompts of a row"),
        (
            {"prompt": {"template": "{a|b}" * 13, "expansion": "all"}, "matrix": {"seed": [1, 2]}},
            "makes 8,192 prompts of a row in 2 combinations of the matrix; at most 10,000 are made",
        ),
        ({"prompt": {"template": "a", "samples": 6000}, "matrix": {"seed": [1, 2]}}, "prompt.samples: makes 6,000"),
        ({"prompt": {"template": "__c__"}}, "there is no wildcard file c.txt; there is: none: name their folder"),
    ],
)
def test_too_much_of_a_row_is_told_before_any_is_made(sections: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_prompts(spec(**sections), {}, [])
    assert told in str(caught.value)
