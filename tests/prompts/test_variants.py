"""What becomes of a row under templates and a matrix: its images, their ids, seeds and words."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdbatch.errors import UsageError
from sdbatch.prompts import ImageRequest, ModelFacts, RowIds, requests_of_slice, slice_rows, template_columns
from sdbatch.spec import JobSpec, parse_spec


def spec(**sections: Any) -> JobSpec:
    return parse_spec({"name": "t", "input": {"uri": "p.csv"}, "output": {"uri": "out"}, **sections})


def planned(job: JobSpec, *rows: dict[str, str], first: int = 0) -> list[ImageRequest]:
    cells = [{f"word:{name}": cell for name, cell in row.items()} for row in rows]
    return requests_of_slice(cells, first, job, ModelFacts((64, 64)), RowIds(False))


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
    plain = requests_of_slice([{"prompt": "a cat"}], 0, spec(), ModelFacts((64, 64)), RowIds(False))
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
    ]
    found = requests_of_slice(rows, 0, job, ModelFacts((64, 64)), RowIds(False))
    assert [request.prompt for request in found[:2]] == ["a cat 1", "b cat 1"]
    assert [request.fault for request in found[2:]] == [
        "row 2: its template can't be read: the '{' at character 1 is not closed; write \\{ for the character itself",
        "row 3: its template names {nothing}, which neither input.keep nor matrix gives",
        "row 4: its template needs {what}, and the row has nothing there",
        "row 5: its template makes 100,000 prompts; at most 10,000 a row are made",
        "row 6: the prompt is empty",
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
    ],
)
def test_mistakes_are_told_before_anything_is_read(sections: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        template_columns(spec(**sections), ["what"])


def test_slices_hold_fewer_rows_where_rows_make_many_images() -> None:
    assert slice_rows(spec(), {}) == 16_384
    assert slice_rows(spec(generate={"num_images_per_prompt": 1000}), {}) == 262
    assert slice_rows(spec(prompt={"template": "{a|b}" * 10, "expansion": "all"}), {}) == 256
