"""Rates and their intervals, counted from scenes; the tables of them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sdbatch.evaluation import tables
from sdbatch.evaluation.fidelity import ATTRIBUTES, MEANING, Fidelity, Reading, measure, wilson
from sdbatch.evaluation.prompts import CELLS, Setting, prompt_table, scene_from_json, scene_to_json
from sdbatch.training.world import COLOURS, random_scene

FAST, SLOW = Setting("euler", 4, 1.0), Setting("dpmpp_2m", 20, 5.0)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_intervals_are_those_of_newcombe_1998_table_1(right: int, n: int, low: float, high: float) -> None:
    assert wilson(right, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_an_interval_is_wilsons_and_holds_its_share(counts: tuple[int, int]) -> None:
    low, high = wilson(*counts)
    expected = stats.binomtest(*counts).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert 0 <= low <= counts[0] / counts[1] <= high <= 1


def test_of_nothing_nothing_is_known() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


def readings(cell: str, count: int, setting: Setting = FAST) -> list[Reading]:
    """Pictures that show what was told; of pairs from the left or the upper thing on, as pictures are read."""
    things, novel = CELLS[cell]
    rng = np.random.default_rng(7)
    found = []
    while len(found) < count:
        scene = random_scene(rng, things=things, novel=novel)
        if scene.relation not in {"below", "right of"}:
            found.append(Reading(cell, len(found), setting, "a prompt", "data/x.png", scene, scene))
    return found


def another_colour(reading: Reading) -> Reading:
    thing, *others = reading.seen.things
    colour = next(name for name in COLOURS if name not in {each.colour for each in reading.seen.things})
    return replace(reading, seen=replace(reading.seen, things=(replace(thing, colour=colour), *others)))


def test_what_is_right_is_counted_by_attribute() -> None:
    pictures = readings("one-seen", 20)
    pictures[3], pictures[8] = another_colour(pictures[3]), another_colour(pictures[8])
    [cell] = measure(pictures, [FAST]).settings[FAST]
    assert (cell.name, cell.n) == ("one-seen", 20)
    assert set(cell.rates) == set(ATTRIBUTES) - {"relation"}
    wrong = {name for name, rate in cell.rates.items() if rate.right < rate.n}
    assert wrong == {"colour", "things", "placed", "all"}
    assert (cell.rates["all"].right, cell.rates["all"].n) == (18, 20)
    assert cell.shifted is not None
    assert cell.shifted.right <= 1


def test_pairs_have_a_relation_and_no_place() -> None:
    [cell] = measure(readings("two-novel", 3), [FAST]).settings[FAST]
    assert set(cell.rates) == set(ATTRIBUTES) - {"place"}


def test_shifted_holds_each_picture_against_the_next_prompt() -> None:
    first, second = readings("one-seen", 2)
    [cell] = measure([second, replace(first, seen=second.told)], [FAST]).settings[FAST]
    assert cell.rates["all"].right == 1
    assert cell.shifted is not None
    assert (cell.shifted.right, cell.shifted.n) == (1, 2)


def test_one_picture_alone_has_no_next() -> None:
    [cell] = measure(readings("one-seen", 1), [FAST]).settings[FAST]
    assert cell.shifted is None


def whole() -> Fidelity:
    pictures = [reading for setting in (SLOW, FAST) for cell in CELLS for reading in readings(cell, 4, setting)]
    return measure(pictures, [SLOW, FAST])


def test_settings_and_cells_keep_their_order() -> None:
    found = whole()
    assert list(found.settings) == [SLOW, FAST]
    assert [cell.name for cell in found.settings[SLOW]] == list(CELLS)


def test_a_setting_without_pictures_is_left_out() -> None:
    assert list(measure(readings("one-seen", 2), [SLOW, FAST]).settings) == [FAST]


def test_the_content_is_json() -> None:
    content = json.loads(json.dumps(whole().content()))
    assert [setting["sampler"] for setting in content] == ["dpmpp_2m", "euler"]
    cell = content[0]["cells"][3]
    assert (cell["cell"], cell["things"], cell["novel"], cell["n"]) == ("two-novel", 2, True, 4)
    assert cell["rates"]["relation"] == {"right": 4, "n": 4, "rate": 1.0, "low": wilson(4, 4)[0], "high": 1.0}


def test_the_tables_tell_every_attribute_and_every_setting() -> None:
    text = tables.markdown(whole())
    rows = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("|")]
    assert [name for name in rows if name in MEANING] == [*ATTRIBUTES, "shifted"]
    assert "| euler | 4 | 1 | 100.0 (51.0–100.0) |" in text
    assert all(f"*{name}*" in text for name in MEANING)
    widths = {len(line.split(" | ")) for line in text.split('"all" at')[0].splitlines() if line.startswith("|")}
    assert widths == {5}


# -- prompts -------------------------------------------------------------------------------------------------


def test_a_scene_comes_back_from_json() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        scene = random_scene(rng)
        assert scene_from_json(scene_to_json(scene)) == scene


def test_every_setting_gets_the_same_scenes_words_and_seeds() -> None:
    rows = prompt_table([FAST, SLOW, FAST], 3, seed=5).to_pylist()
    assert len(rows) == len({row["id"] for row in rows}) == 2 * 4 * 3
    told = [(row["prompt"], row["seed"], row["cell"], row["scene"]) for row in rows]
    assert told[:12] == told[12:]
    assert {row["sampler"] for row in rows[:12]} == {"euler"}


def test_more_prompts_leave_the_fewer_ones_as_they_are() -> None:
    few, many = (prompt_table([FAST], count, seed=5).to_pylist() for count in (2, 5))
    assert [row for row in many if row["number"] < 2] == few


def test_prompts_come_from_their_seed_alone() -> None:
    assert prompt_table([FAST], 3, seed=5).equals(prompt_table([FAST], 3, seed=5))
    assert not prompt_table([FAST], 3, seed=5).equals(prompt_table([FAST], 3, seed=6))


def test_scenes_are_of_their_cell_and_told_in_full() -> None:
    for row in prompt_table([FAST], 20, seed=1).to_pylist():
        scene = scene_from_json(row["scene"])
        assert (len(scene.things), scene.novel) == CELLS[row["cell"]]
        assert all(thing.colour in row["prompt"] for thing in scene.things)
