"""Estimates and budgets on numbers alone: no Ray, no model, no clock."""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdbatch.engine.costs.estimate import Purse, estimate, shapes_of, speed_of, through
from sdbatch.engine.costs.speeds import Conditions, Measured, Speeds, find_speeds, keep_speeds
from sdbatch.ledger import Run, Shard, Shards, dollars, spent_usd
from sdbatch.prompts import Shape
from sdbatch.spec import Resources, parse_spec

SMALL = Shape(64, 64, 20, "ddim", True, 1, None, False)
LARGE = Shape(128, 64, 40, "ddim", True, 1, None, False)
SPEEDS = Speeds("a device", 10.0, 4.0, shapes={SMALL: Measured(10, 20.0, 1, 5.0, images=80, bytes=8000)})


def shards(*counts: int, shape: Shape = SMALL, first: int = 0) -> Shards:
    return Shards.of(Shard(first + i, 0, 0, count, True, **asdict(shape)) for i, count in enumerate(counts))


# -- how long it takes ------------------------------------------------------------------------------------------


def test_one_actor_takes_the_sum_of_everything() -> None:
    found = estimate(shards(8, 8, 3), 4, Resources(), SPEEDS, 1)
    assert (found.images, found.shards, found.batches, found.actors) == (19, 3, 5, 1)
    assert found.wall_seconds == 10 + 5 * 2 + 3  # the start, five batches, and the first one's warm-up
    assert found.actor_hours == pytest.approx((4 + 13) / 3600, abs=1e-6)
    assert found.bytes == 1900
    assert (found.usd, found.gpu_hours, found.scaled) == (None, 0, 0)


def test_a_batch_that_is_not_full_takes_as_long_as_one_that_is() -> None:
    assert estimate(shards(1), 4, Resources(), SPEEDS, 1) == replace(
        estimate(shards(4), 4, Resources(), SPEEDS, 1), images=1, bytes=100
    )


def test_shards_are_not_divided_at_the_end() -> None:
    found = estimate(shards(8, 8, 8), 4, Resources(), SPEEDS, 2)
    assert found.wall_seconds == 10 + 3 + 8  # one actor makes two shards, the other one
    assert found.actor_hours == pytest.approx((2 * 4 + 11 - 4 + 7 - 4 + 8) / 3600, abs=1e-6)


def test_more_actors_than_shards_are_not_asked_for() -> None:
    assert estimate(shards(8, 8), 4, Resources(), SPEEDS, 16).actors == 2
    nothing = estimate(shards(), 4, Resources(usd_per_gpu_hour=2.0), SPEEDS, 16)
    assert (nothing.actors, nothing.wall_seconds, nothing.usd, nothing.bytes) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("gpus", "gpu_hours", "usd"),
    [(0.0, 0.0, 0.006), (1.0, 0.003, 0.006), (0.5, 0.0015, 0.003), (2.0, 0.006, 0.012)],
)
def test_money_is_by_the_gpu_and_by_the_actor_where_there_is_none(gpus: float, gpu_hours: float, usd: float) -> None:
    speeds = Speeds("a device", 10.0, 4.8, shapes={SMALL: Measured(batches=1, seconds=1.0)})
    found = estimate(shards(24), 4, Resources(gpus_per_actor=gpus, usd_per_gpu_hour=2.0), speeds, 1)
    assert found.actor_hours == 0.003
    assert (found.gpu_hours, found.usd) == (gpu_hours, usd)
    assert found.bytes is None  # no picture was measured


def test_what_was_not_measured_is_scaled_by_pixels_and_steps_and_says_so() -> None:
    found, measured = speed_of(LARGE, SPEEDS)
    assert not measured
    assert found.a_batch == 4 * 2.0
    assert found.bytes / found.images == 2 * 100
    several = Shards.joined([shards(4), shards(4, shape=LARGE, first=1)])
    assert estimate(several, 4, Resources(), SPEEDS, 1).scaled == 0.8
    assert speed_of(replace(SMALL, strength=0.5), SPEEDS)[0].a_batch == 1.0
    assert speed_of(replace(SMALL, sampler="heun_karras"), SPEEDS)[0].a_batch == 4.0
    assert speed_of(replace(SMALL, guided=False), SPEEDS)[0].a_batch == 1.0


def test_the_nearest_shape_is_scaled_from() -> None:
    speeds = replace(SPEEDS, shapes={**SPEEDS.shapes, LARGE: Measured(batches=1, seconds=100.0)})
    assert speed_of(replace(LARGE, num_inference_steps=44), speeds)[0].a_batch == pytest.approx(110)


def test_shapes_are_found_with_their_shards() -> None:
    several = Shards.joined([shards(4, 2), shards(4, shape=replace(SMALL, strength=0.5), first=2), shards(1, first=3)])
    assert [(shape, places.tolist()) for shape, places in shapes_of(several)] == [
        (SMALL, [0, 1, 3]),
        (replace(SMALL, strength=0.5), [2]),
    ]


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=40), st.integers(1, 8))
def test_actors_together_take_what_the_shards_take_and_none_is_idle_for_long(seconds: list[float], actors: int) -> None:
    ends = through(seconds, [0] * len(seconds), [0.0], actors)
    assert len(ends) == min(actors, len(seconds))
    assert sum(ends) == pytest.approx(sum(seconds))
    assert max(ends) <= sum(seconds) / len(ends) + 2 * max(seconds) + 1e-6  # each holds one more than it works on


# -- the budget -------------------------------------------------------------------------------------------------


@given(
    actors=st.integers(1, 6),
    seconds=st.floats(0, 300),
    load=st.floats(0, 20),
    durations=st.lists(st.floats(0.2, 15), min_size=1, max_size=20),
    known=st.booleans(),
    look=st.floats(0.1, 2),
)
def test_a_purse_is_overdrawn_by_one_batch_an_actor_at_most_and_by_nothing_where_batches_were_known(
    actors: int, seconds: float, load: float, durations: list[float], known: bool, look: float
) -> None:
    """Actors that load and then make batches of these lengths for ever, asked every ``look`` seconds."""
    purse = Purse(seconds, max(durations) if known else 0.0)
    taken = simulate(purse, actors, load, durations, look)
    overdraft = taken - max(seconds, 0.0)
    assert overdraft <= actors * (max(durations) + look) + 1e-6
    if known and seconds >= actors * (load + max(durations) + 2 * look):
        assert overdraft <= 1e-6


def simulate(purse: Purse, actors: int, load: float, durations: list[float], look: float) -> float:
    """Actor-seconds taken when the pool's rule ends the work: every actor to the end of its batch."""
    ends = [(load, actor, 0) for actor in range(actors)]
    heapq.heapify(ends)
    longest, now = 0.0, 0.0
    while True:
        now += look
        while ends[0][0] <= now:
            end, actor, made = heapq.heappop(ends)
            longest = max(longest, durations[(actor + made - 1) % len(durations)] if made else 0.0)
            heapq.heappush(ends, (end + durations[(actor + made) % len(durations)], actor, made + 1))
        at_work = sum(made > 0 for _, _, made in ends)
        if purse.is_spent(actors * now, at_work, longest, look):
            return sum(end if made else now for end, _, made in ends)


def test_a_purse_without_a_bottom_is_never_spent() -> None:
    assert not Purse().is_spent(1e12, 100, 1e6, 1.0)


def test_a_driver_that_never_said_how_it_ended_pays_until_its_next_line() -> None:
    killed, ended = Run(actors=2, actor_seconds=100.0), Run(actors=2, actor_seconds=100.0, ended="failed")
    assert (killed.charged_seconds, ended.charged_seconds) == (110.0, 100.0)


def test_runs_pay_their_own_prices_and_those_without_one_todays() -> None:
    runs = [Run(ended="failed", actor_seconds=3600, usd_per_actor_hour=price) for price in (2.0, 3.0, None)]
    assert spent_usd(runs, 4.0) == 9.0


@pytest.mark.parametrize(
    ("usd", "told"),
    [
        (1234.5, "$1,234.50"),
        (1.0, "$1.00"),
        (0.25, "$0.250"),
        (0.0123, "$0.0123"),
        (0, "$0.00"),
        (1e-12, "$0.000000000"),
    ],
)
def test_amounts_are_told_in_cents_or_three_digits(usd: float, told: str) -> None:
    assert dollars(usd) == told


# -- the record of speeds ---------------------------------------------------------------------------------------


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "sdbatch/speeds.json"


def conditions(output: Mapping[str, Any] = {}, **resources: Any) -> Conditions:
    spec = {"name": "a", "input": {"uri": "p.csv"}, "output": {"uri": "o", **output}, "resources": resources}
    return Conditions.of(parse_spec(spec), "sha256")


def test_what_was_measured_is_found_again_under_the_same_conditions_only(record: Path) -> None:
    assert find_speeds(conditions()) is None
    keep_speeds(conditions(), SPEEDS)
    found = find_speeds(conditions())
    assert found is not None
    assert (found.shapes, found.device, found.loading_seconds) == (SPEEDS.shapes, "a device", 4.0)
    assert find_speeds(conditions(batch_size=4)) is None
    assert find_speeds(conditions(gpus_per_actor=1)) is None
    assert find_speeds(conditions({"thumbnail": 64})) is None
    assert find_speeds(conditions({"renditions": {"square": {"size": "32x32"}}})) is None
    assert "copies" not in conditions().content()  # what was on record before there were any is found


def test_signed_pictures_and_those_without_loss_are_measured_by_themselves(record: Path) -> None:
    webp, c2pa = {"type": "webp"}, {"certificate": "chain.pem", "key": "key.pem"}
    outputs = [{"image": webp}, {"image": {**webp, "lossless": True}}, {"image": webp, "c2pa": c2pa}]
    assert [conditions(output).picture for output in outputs] == ["webp 90", "webp lossless", "webp 90 signed"]
    assert conditions({"image": {**webp, "lossless": True, "quality": 5}}).picture == "webp lossless"
    assert conditions().picture == "png"


def test_the_newest_device_counts_and_measurements_add_up(record: Path) -> None:
    keep_speeds(conditions(), SPEEDS)
    keep_speeds(conditions(), replace(SPEEDS, device="another", shapes={LARGE: Measured(batches=1, seconds=9.0)}))
    keep_speeds(conditions(), replace(SPEEDS, shapes={SMALL: Measured(batches=10, seconds=40.0)}))
    found = find_speeds(conditions())
    assert found is not None
    assert (found.device, list(found.shapes)) == ("a device", [SMALL])
    assert found.shapes[SMALL].a_batch == 3.0


def test_old_measurements_fade(record: Path) -> None:
    fresh = Measured(batches=256, seconds=256.0).after(Measured(batches=10**6, seconds=10.0**7))
    assert fresh.a_batch == pytest.approx(5.5)


def test_first_batches_count_where_there_are_no_others() -> None:
    assert Measured(firsts=2, first_seconds=6.0).a_batch == 3.0
    assert Measured(firsts=2, first_seconds=6.0).warm_up == 0.0
    assert SPEEDS.shapes[SMALL].warm_up == 3.0


def test_an_output_knows_its_own_speed_best(record: Path) -> None:
    others = {SMALL: Measured(batches=1, seconds=1.0), LARGE: Measured(batches=1, seconds=7.0)}
    keep_speeds(conditions(), replace(SPEEDS, shapes=others))
    own = Run(conditions=conditions().content(), speeds=SPEEDS.content())
    found = find_speeds(conditions(), [Run(), own, replace(own, conditions=conditions(batch_size=2).content())])
    assert found is not None
    assert (found.shapes[SMALL].a_batch, found.shapes[LARGE].a_batch, found.source) == (2.0, 7.0, "this output's runs")


@pytest.mark.parametrize("text", ["", "[", "{}", "[1]", '[{"conditions": {}, "speeds": {}}]'])
def test_a_record_that_is_damaged_counts_as_none_and_is_written_anew(text: str, record: Path) -> None:
    record.parent.mkdir(parents=True)
    record.write_text(text)
    assert find_speeds(conditions()) is None
    keep_speeds(conditions(), SPEEDS)
    assert len(json.loads(record.read_text())) == 1


def test_a_record_that_cannot_be_written_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    keep_speeds(conditions(), SPEEDS)
    assert find_speeds(conditions()) is None


# -- the spec ---------------------------------------------------------------------------------------------------


def test_money_decides_nothing_of_the_plan() -> None:
    raw = {"name": "a", "input": {"uri": "p.csv"}, "output": {"uri": "o"}}
    priced = {**raw, "resources": {"usd_per_gpu_hour": 2, "budget_usd": 5}}
    assert parse_spec(priced).deciding() == parse_spec(raw).deciding()
    assert math.isclose(parse_spec(priced).resources.usd_per_actor_hour or 0, 2.0)
