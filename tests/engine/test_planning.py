"""Plans made slice by slice by Ray's tasks, ids that are there twice, and plans that grow with their table."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from sdbatch.engine.planning import ids, planner, reading, tasks
from sdbatch.errors import InputError, StorageError
from sdbatch.ledger import read_job, read_shards, read_slice
from sdbatch.storage import LocalStore, open_store
from tests.conftest import CommandLine
from tests.drawn import drawn

Write = Callable[..., Path]
NULL = {"uri": "builtin:null"}


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "SLICE_ROWS", 4)


def table(count: int, first: int = 0, other: int | None = None) -> str:
    rows = (f"r{i},{'another' if i == other else 'prompt'} {i}\n" for i in range(first, first + count))
    return "id,prompt\n" + "".join(rows)


def write_prompts(path: Path, count: int, first: int = 0) -> None:
    path.write_text(table(count, first))


def sums(folder: Path, below: str = "") -> dict[str, str]:
    """Key → sha256 of everything stored but the lease, which is there only while a driver works."""
    keys = [entry.key for entry in LocalStore(folder).list(below)]
    return {key: hashlib.sha256((folder / key).read_bytes()).hexdigest() for key in keys}


def image_ids(output: Path) -> list[str]:
    """Of all planned requests, in the order of the shards."""
    store = LocalStore(output)
    job, found = read_job(store), list[str]()
    for shard in read_shards(store, job):
        requests = read_slice(store, job, shard.slice).slice(shard.offset, shard.count)
        found += requests.column("image_id").to_pylist()
    return found


def test_the_plan_is_the_same_whatever_the_number_of_tasks(
    sdbatch: CommandLine, write_job: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_prompts(tmp_path / "prompts.csv", 23)
    plans = []
    for most in (1, 5):
        monkeypatch.setattr(tasks, "at_once", lambda most=most: most)
        output = tmp_path / f"out{most}"
        sdbatch("plan", write_job(model=NULL, output={"uri": str(output), "shard_size": 3}))
        plans.append(sums(output, "_sdbatch/plan/"))
    assert plans[0] == plans[1]
    assert len(plans[0]) == 6 + 2


def test_slices_and_shards_are_numbered_in_the_order_of_the_rows(
    sdbatch: CommandLine, write_job: Write, tmp_path: Path
) -> None:
    (tmp_path / "prompts.csv").write_text(
        "prompt,w\n" + "".join(f"prompt {i},{(16, 24)[i % 2]}\n" if i != 5 else ",16\n" for i in range(10))
    )
    job = write_job(model=NULL, input={"columns": {"width": "w"}}, output={"shard_size": 2})
    assert sdbatch.json("plan", job)["sizes"] == {"16x16": 5, "24x16": 4}
    store = LocalStore(tmp_path / "out")
    shards = read_shards(store, read_job(store))
    assert [(s.number, s.slice, s.offset, s.count, s.makeable) for s in shards] == [
        (0, 0, 0, 2, True),
        (1, 0, 2, 2, True),
        (2, 1, 0, 2, True),
        (3, 1, 2, 1, True),
        (4, 1, 3, 1, False),
        (5, 2, 0, 1, True),
        (6, 2, 1, 1, True),
    ]
    assert [shard.number for shard in shards.of_slice(1)] == [2, 3, 4]
    assert (shards.images, shards.makeable(False).images, len(shards.of_slice(3))) == (10, 1, 0)


@pytest.mark.parametrize(("rows", "group"), [(100, 16), (3, 2)])
def test_a_doubled_id_is_found_wherever_its_first_row_is(
    rows: int, group: int, sdbatch: CommandLine, write_job: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "ID_ROWS", rows)
    monkeypatch.setattr(ids, "GROUP", group)
    names = ["a", "b", "", "a", "c", "row:7", "b", "d", "e", "a", "", "f", "d", "g", "g", "h", "i", "j", "a", "k"]
    (tmp_path / "prompts.csv").write_text("id,prompt\n" + "".join(f"{name},prompt\n" for name in names))
    sdbatch("plan", write_job(model=NULL, input={"columns": {"id": "id"}}))
    faults = {}
    for path in sorted((tmp_path / "out/_sdbatch/plan").glob("*/requests-*.parquet")):
        for row in pq.read_table(path).to_pylist():
            if row["fault"] and "already" in row["fault"]:
                faults[row["image_id"]] = row["fault"]
    assert faults == {
        "row:00000003-0": "row 4: the id 'a' is row 1's already",
        "row:00000006-0": "row 7: the id 'b' is row 2's already",
        "row:00000009-0": "row 10: the id 'a' is row 1's already",
        "row:00000012-0": "row 13: the id 'd' is row 8's already",
        "row:00000014-0": "row 15: the id 'g' is row 14's already",
        "row:00000018-0": "row 19: the id 'a' is row 1's already",
    }


def test_a_column_of_few_values_is_no_column_of_ids(
    sdbatch: CommandLine, write_job: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ids, "MOST_DOUBLES", 3)
    (tmp_path / "prompts.csv").write_text("id,prompt\n" + "x,prompt\n" * 5)
    told = sdbatch("plan", write_job(model=NULL, input={"columns": {"id": "id"}}), code=2).stderr
    assert "input.columns.id: more than 3 rows have an id that an earlier row has" in told
    assert "map another" in told


def test_an_error_in_a_task_is_told_as_one_of_ours(ray_here: None) -> None:
    import ray

    def refused() -> None:
        raise InputError("row 1: no")

    with pytest.raises(InputError, match=r"^row 1: no$"):
        tasks.result_of(ray.remote(**tasks.TASK)(refused).remote())


# -- extensions ------------------------------------------------------------------------------------------------

Grow = Callable[[Path], None]


def by_rows(folder: Path) -> None:
    with (folder / "in/a.csv").open("a") as file:
        file.write("r6,prompt 6\nr7,prompt 7\nr8,prompt 8\n")


def by_a_file(folder: Path) -> None:
    write_prompts(folder / "in/b.csv", 3, first=6)


@pytest.fixture
def job(sdbatch: CommandLine, write_job: Write, tmp_path: Path) -> Path:
    """Six rows in two slices, planned and made."""
    (tmp_path / "in").mkdir()
    write_prompts(tmp_path / "in/a.csv", 6)
    job = write_job(model=NULL, input={"uri": str(tmp_path / "in"), "columns": {"id": "id"}}, output={"shard_size": 3})
    assert sdbatch.json("run", job)["state"] == "complete"
    return job


def kept(folder: Path) -> dict[str, str]:
    """What an extension may not touch: plan, pictures, metadata."""
    return {
        key: sha256
        for below in ("_sdbatch/plan/", "_sdbatch/job", "data/", "metadata/")
        for key, sha256 in sums(folder, below).items()
    }


@pytest.mark.parametrize("grow", [by_rows, by_a_file])
def test_new_rows_are_added_to_a_finished_output(grow: Grow, job: Path, sdbatch: CommandLine, tmp_path: Path) -> None:
    before = kept(tmp_path / "out")
    grow(tmp_path)
    assert "--extend" in sdbatch("run", job, code=2).stderr
    made = sdbatch.json("run", job, "--extend")
    assert (made["state"], made["planned"], made["added"], made["made_now"]) == ("complete", 9, 3, 3)
    after = kept(tmp_path / "out")
    assert {key: after.get(key) for key in before} == before
    assert image_ids(tmp_path / "out") == [f"r{i}-0" for i in range(9)]
    assert sdbatch.json("verify", "out")["ok"]
    rows = pq.read_table(tmp_path / "out/metadata").to_pylist()
    assert [row["image_id"] for row in rows] == [f"r{i}-0" for i in range(9)]
    # As if all had been planned at once.
    sdbatch("run", job, "--set", f"output.uri={tmp_path}/whole")
    assert drawn(open_store(str(tmp_path / "out"))) == drawn(open_store(str(tmp_path / "whole")))
    assert sdbatch.json("run", job)["made_now"] == 0


def test_an_output_is_extended_again_and_again_and_numbers_go_on(
    sdbatch: CommandLine, write_job: Write, tmp_path: Path
) -> None:
    job = write_job(model=NULL, output={"shard_size": 3})
    for count, added in ((6, 6), (7, 1), (16, 9), (16, 0)):
        write_prompts(tmp_path / "prompts.csv", count)
        planned = sdbatch.json("plan", job, "--extend")
        assert (planned["planned"], planned["added"]) == (count, added)
        assert image_ids(tmp_path / "out") == [f"{i:08d}-0" for i in range(count)]
    store = LocalStore(tmp_path / "out")
    found = read_job(store)
    assert [(part.rows, part.slices, part.shards) for part in found.parts] == [(6, 2, 3), (1, 1, 1), (9, 3, 5)]
    shards = read_shards(store, found)
    assert [shard.number for shard in shards] == list(range(9))
    assert [shard.slice for shard in shards] == [0, 0, 1, 2, 3, 3, 4, 4, 5]
    assert found.part_of_slice(2) == found.parts[1]
    assert "the input has no new rows" in sdbatch("plan", job, "--extend").stderr


def test_ids_of_new_rows_are_compared_with_those_of_old_ones(job: Path, sdbatch: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "in/b.csv").write_text("id,prompt\nr2,again\nr9,new\nr9,again\n")
    assert sdbatch.json("run", job, "--extend", code=3)["quarantined"] == 2
    assert [failure["error"] for failure in sdbatch.json("errors", "out")] == [
        "row 7: the id 'r2' is row 3's already",
        "row 9: the id 'r9' is row 8's already",
    ]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"a.csv": table(9, other=0)}, "rows 1 to 4 are no longer those that were planned"),
        ({"a.csv": table(9, other=5)}, "rows 5 to 6 are no longer those that were planned"),
        ({"a.csv": table(5)}, "ends after row 5; 6 rows were planned"),
        ({"a.csv": table(4)}, "ends after row 4; 6 rows were planned"),
        ({"0.csv": "id,prompt\nr9,new\n"}, "0.csv is new, and not after a.csv"),
        ({"a.csv": None, "b.csv": "id,prompt\nr9,new\n", "c.csv": "id,prompt\nr10,new\n"}, "a.csv is gone"),
    ],
)
def test_an_extension_of_anything_but_new_rows_is_refused(
    change: dict[str, str | None], told: str, job: Path, sdbatch: CommandLine, tmp_path: Path
) -> None:
    before = kept(tmp_path / "out")
    for name, text in change.items():
        (tmp_path / "in" / name).unlink(missing_ok=True)
        if text is not None:
            (tmp_path / "in" / name).write_text(text)
    assert told in sdbatch("run", job, "--extend", code=2).stderr
    assert kept(tmp_path / "out") == before


def test_a_file_before_the_last_may_not_change(job: Path, sdbatch: CommandLine, tmp_path: Path) -> None:
    by_a_file(tmp_path)
    sdbatch("run", job, "--extend")
    by_rows(tmp_path)
    told = sdbatch("run", job, "--extend", code=2).stderr
    assert "a.csv changed, and is not the last of those that were planned" in told


def test_an_extension_that_was_cut_short_is_made_again(
    job: Path, sdbatch: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_a_file(tmp_path)
    with monkeypatch.context() as patch:

        def fails(*arguments: Any) -> None:
            raise StorageError("gone")

        patch.setattr(planner, "write_job", fails)
        sdbatch("run", job, "--extend", code=1)
    assert sdbatch.json("status", "out")["planned"] == 6
    assert sdbatch.json("run", job, "--extend")["committed"] == 9
    assert sdbatch.json("verify", "out")["ok"]


def test_of_two_extensions_the_first_stands(job: Path, sdbatch: CommandLine, tmp_path: Path) -> None:
    from sdbatch.spec import load_spec

    by_a_file(tmp_path)
    slow = planner.prepare(load_spec(job))
    standing = read_job(slow.store)
    sdbatch("plan", job, "--extend")
    by_first = sums(tmp_path / "out", "_sdbatch/")
    assert planner.extend_plan(slow, standing, lambda rows: None) == read_job(slow.store)
    assert sums(tmp_path / "out", "_sdbatch/") == by_first
    assert len(read_job(slow.store).parts) == 2


def test_a_wildcard_file_that_changed_is_another_plan(sdbatch: CommandLine, write_job: Write, tmp_path: Path) -> None:
    (tmp_path / "prompts.csv").write_text("thing\nring\nstar\n")
    (tmp_path / "words").mkdir()
    (tmp_path / "words/colours.txt").write_text("red\nblue\n")
    prompt = {"template": "a __colours__ {thing}", "wildcards": "words", "expansion": "all"}
    job = write_job(prompt=prompt, matrix={"guidance_scale": [2, 3]})
    made = sdbatch.json("run", job)
    assert made["planned"] == made["committed"] == 8
    rows = pq.read_table(tmp_path / "out/metadata").to_pylist()
    assert {row["template"] for row in rows} == {"a __colours__ {thing}"}
    assert {row["prompt"] for row in rows} == {
        f"a {colour} {thing}" for colour in ("red", "blue") for thing in ("ring", "star")
    }
    (tmp_path / "words/other.txt").write_text("{of no use here")
    assert sdbatch.json("run", job)["made_now"] == 0
    (tmp_path / "words/colours.txt").write_text("red\ngreen\n")
    assert "wildcards.colours" in sdbatch("run", job, code=2).stderr


def test_the_first_images_are_shown_in_the_order_of_the_table(
    sdbatch: CommandLine, write_job: Write, tmp_path: Path
) -> None:
    (tmp_path / "prompts.csv").write_text("id,thing\nr0,ring\nr1,\nr0,star\nr2,{heart}\nr3,cross\nr4,moon\n")
    job = write_job(
        model=NULL,
        input={"columns": {"id": "id"}},
        prompt={"template": "a {red|blue} {thing}, {style}"},
        matrix={"size": ["16x16", "24x16"], "style": ["[bold]flat"]},
    )
    shown = sdbatch.json("plan", job, "--show", "7")["show"]
    assert [(row["image_id"], row["width"], row["error"]) for row in shown] == [
        ("r0-0-0", 16, None),
        ("r0-1-0", 24, None),
        ("r1-0-0", 16, "row 2: its template needs {thing}, and the row has nothing there"),
        ("row:00000002-0-0", 16, "row 3: the id 'r0' is row 1's already"),
        ("r2-0-0", 16, None),
        ("r2-1-0", 24, None),
        ("r3-0-0", 16, None),
    ]
    planned = pq.read_table(sorted((tmp_path / "out/_sdbatch/plan").glob("*/requests-*.parquet"))).to_pylist()
    stored = {row["image_id"]: row for row in planned}
    for row in shown:
        same = ("prompt", "seed", "template", "num_inference_steps")
        assert [row[name] for name in same] == [stored[row["image_id"]][name] for name in same]
        assert row.get("style") == (stored[row["image_id"]]["kept"] or {}).get("style")
    assert re.fullmatch(r"a (red|blue) \{heart\}, \[bold\]flat", shown[4]["prompt"])
    told = sdbatch("plan", job, "--show", "5").stderr
    assert [line.split()[0] for line in told.splitlines()[:5]] == [row["image_id"] for row in shown[:5]]
    assert shown[4]["prompt"] in told
    # What was planned before goes on to hold when the table grows.
    with (tmp_path / "prompts.csv").open("a") as table:
        table.write("r5,wave\n")
    assert sdbatch.json("run", job, "--extend", code=3)["added"] == 2
    assert sdbatch.json("retry", "out", code=3)["made_now"] == 0
    rows = pq.read_table(tmp_path / "out/metadata").to_pylist()
    assert {row["image_id"]: row["prompt"] for row in rows if row["image_id"] in stored} == {
        name: row["prompt"] for name, row in stored.items()
    }
    assert sdbatch.json("verify", "out")["ok"]
