"""From rows to image requests to shards: pure functions, tried with rows that nobody would write on purpose."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdbatch.prompts import (
    ImageRequest,
    ModelFacts,
    RowIds,
    cut,
    doubled_ids,
    from_table,
    image_seed,
    odd_sizes,
    requests_of_slice,
    rows_sha256,
    to_table,
    usable_ids,
)
from sdbatch.spec import JobSpec, parse_spec

#: image_seed(7, "x", 0): a release that changes it changes every picture of every job.
KNOWN_SEED = 5891772496828971


def spec(**generate: Any) -> JobSpec:
    return parse_spec(
        {
            "name": "t",
            "input": {"uri": "x.csv", "keep": {"note": "Note"}},
            "output": {"uri": "out"},
            "generate": {"sampler": "ddim", **generate},
        }
    )


def requests(rows: list[dict[str, str | None]], job: JobSpec | None = None, mapped: bool = False) -> list[ImageRequest]:
    return list(requests_of_slice(rows, 0, job or spec(), ModelFacts((64, 64)), RowIds(mapped, doubles(rows))))


def doubles(rows: list[dict[str, str | None]]) -> dict[int, int]:
    ids = pa.chunked_array([pa.array([row.get("id") for row in rows], pa.string())])
    found = doubled_ids(usable_ids(ids, 0))[1]
    return dict(zip(found.column("row").to_pylist(), found.column("first").to_pylist(), strict=True))


def fault(row: dict[str, str | None], **generate: Any) -> str | None:
    (request,) = requests([{"prompt": "a", **row}], spec(**generate))
    return request.fault


def test_a_row_gets_the_defaults_of_the_spec() -> None:
    (request,) = requests([{"prompt": "a cat", "keep:note": "x"}], spec(num_inference_steps=9, negative_prompt="dog"))
    assert request.image_id == "00000000-0"
    assert (request.width, request.height) == (64, 64)
    assert (request.num_inference_steps, request.negative_prompt) == (9, "dog")
    assert request.kept == {"note": "x"}
    assert request.fault is None


def test_cells_override_the_spec_row_by_row() -> None:
    row = {
        "prompt": "a",
        "seed": "41337",
        "width": "128.0",
        "height": "72",
        "num_inference_steps": "4",
        "guidance_scale": "1.5",
        "sampler": "euler",
        "negative_prompt": "",
    }
    (request,) = requests([row], spec(negative_prompt="dog"))
    assert (request.seed, request.width, request.height) == (41337, 128, 72)
    assert (request.num_inference_steps, request.guidance_scale, request.sampler) == (4, 1.5, "euler")
    assert request.negative_prompt == "dog"  # an empty cell takes the spec's


def test_images_of_a_row_have_seeds_of_their_own() -> None:
    job = spec(num_images_per_prompt=3, seed=5)
    derived = [request.seed for request in requests([{"prompt": "a"}, {"prompt": "a"}], job)]
    assert len(set(derived)) == 6
    assert [request.seed for request in requests([{"prompt": "a", "seed": "10"}], job)] == [10, 11, 12]


def test_a_derived_seed_depends_on_the_id_and_not_on_the_place() -> None:
    rows = [{"prompt": "a", "id": "x"}, {"prompt": "b", "id": "y"}]
    seeds = {request.row_id: request.seed for request in requests(rows, mapped=True)}
    assert seeds == {request.row_id: request.seed for request in requests(rows[::-1], mapped=True)}
    assert image_seed(7, "x", 0) == KNOWN_SEED


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": None}, "the prompt is empty"),
        ({"prompt": "  \n"}, "the prompt is empty"),
        ({"prompt": "x" * 10_000}, "has 10000 characters; prompt.max_characters allows 4000"),
        ({"prompt": "a\0b"}, "prompt holds a NUL character"),
        ({"seed": "-1"}, "seed is '-1'; should be a whole number from 0"),
        ({"seed": "1.5"}, "seed is '1.5'"),
        ({"width": "wide"}, "width is 'wide'"),
        ({"num_inference_steps": "0"}, "num_inference_steps is '0'; should be a whole number from 1 to 1000"),
        ({"guidance_scale": "inf"}, "guidance_scale is 'inf'"),
        ({"sampler": "magic"}, "sampler is 'magic'; use one of ddpm"),
        ({"fault": "is not JSON"}, "is not JSON"),
    ],
)
def test_a_bad_cell_is_its_rows_fault_and_names_the_row(row: dict[str, str | None], told: str) -> None:
    found = fault(row)
    assert found is not None
    assert found.startswith("row 1: ")
    assert told in found


def test_empty_and_doubled_ids_are_faults_under_ids_that_no_cell_can_claim() -> None:
    rows = [{"prompt": "a", "id": name} for name in ("x", "", "x", "row:00000002", None)]
    made = requests(rows, mapped=True)
    assert [request.fault is None for request in made] == [True, False, False, False, False]
    assert "the id 'x' is row 1's already" in str(made[2].fault)
    assert len({request.image_id for request in made}) == 5


def test_sizes_that_are_no_multiple_of_eight_are_found_or_rounded() -> None:
    rows = [{"prompt": "a", "width": "640", "height": "427"}, {"prompt": "b"}]
    (odd,) = odd_sizes(requests(rows), 100)
    assert (odd.row, odd.width, odd.height) == (100, 640, 427)
    heights = {how: requests(rows, spec(round_size=how))[0].height for how in ("nearest", "down", "up")}
    assert heights == {"nearest": 424, "down": 424, "up": 432}


cells = st.one_of(st.none(), st.text(max_size=12), st.integers(-5, 70).map(str), st.floats().map(repr))
rows_of_any_kind = st.lists(
    st.fixed_dictionaries(
        {"prompt": st.one_of(st.none(), st.text(max_size=20)), "id": st.one_of(st.none(), st.sampled_from("abc"))},
        optional=dict.fromkeys(("seed", "width", "height", "guidance_scale", "sampler", "keep:note"), cells),
    ),
    max_size=30,
)


@given(rows=rows_of_any_kind, shard_size=st.integers(1, 7))
def test_every_row_ends_in_exactly_one_shard(rows: list[dict[str, str | None]], shard_size: int) -> None:
    planned = requests(rows, spec(round_size="up"), mapped=True)
    runs = cut(planned, shard_size)
    held = [request for run in runs for request in run.requests]
    assert sorted(request.image_id for request in held) == sorted(request.image_id for request in planned)
    assert len({request.image_id for request in held}) == len(planned) == len(rows)
    for run in runs:
        assert 1 <= len(run.requests) <= shard_size
        assert {request.shape if run.shape else None for request in run.requests} == {run.shape}
        assert all((request.fault is not None) == (run.shape is None) for request in run.requests)


@given(rows=rows_of_any_kind)
def test_the_plan_keeps_requests_as_they_are(rows: list[dict[str, str | None]]) -> None:
    planned = requests(rows, mapped=True)
    assert from_table(to_table(planned, ["note"])) == planned


@given(ids=st.lists(st.one_of(st.none(), st.sampled_from(["", "a", "b", "c", "row:1", "å"])), max_size=20))
def test_every_id_is_its_first_rows_and_nobody_elses(ids: list[str | None]) -> None:
    usable = usable_ids(pa.chunked_array([pa.array(ids, pa.string())]), 10)
    firsts, found = doubled_ids(usable)
    seen: dict[str, int] = {}
    expected = {}
    for row, name in enumerate(ids, 10):
        if name in {"a", "b", "c", "å"} and seen.setdefault(name, row) != row:
            expected[row] = seen[name]
    assert dict(zip(found.column("row").to_pylist(), found.column("first").to_pylist(), strict=True)) == expected
    assert dict(zip(firsts.column("id").to_pylist(), firsts.column("row").to_pylist(), strict=True)) == seen


def test_a_digest_of_rows_sees_every_cell_and_no_chunk() -> None:
    whole = pa.table({"prompt": ["a", "b", None], "id": ["1", "2", "3"]})
    chunked = pa.concat_tables([whole.slice(0, 1), whole.slice(1)])
    others = [
        pa.table({"prompt": ["a", "b", ""], "id": ["1", "2", "3"]}),
        pa.table({"prompt": ["ab", "", None], "id": ["1", "2", "3"]}),
        pa.table({"prompt": ["1", "2", "3"], "id": ["a", "b", None]}),
        whole.slice(0, 2),
    ]
    assert rows_sha256(chunked) == rows_sha256(whole)
    assert len({rows_sha256(table) for table in [whole, *others]}) == 5
