"""The simulation by cases that can be told by hand."""

from __future__ import annotations

import pytest

from tests.benchmarks.scaling import SHARD, Constants, simulate

FREE = Constants(driver=0.0, logbook=0.0, round_trip=0.0, put=0.0, puts_a_second=1e12)


@pytest.mark.parametrize("actors", [1, 7])
def test_without_queues_every_actor_works_at_its_models_rate(actors: int) -> None:
    assert simulate(actors, 3.0, FREE) == pytest.approx(3.0 * actors)


def test_the_slowest_queue_bounds_many_actors() -> None:
    slow_driver = Constants(driver=2.0, logbook=0.0, round_trip=0.0, put=0.0, puts_a_second=1e12)
    assert simulate(20, 100.0, slow_driver) == pytest.approx(SHARD / 2.0, rel=0.05)
    slow_store = Constants(driver=0.0, logbook=0.0, round_trip=0.0, put=0.0, puts_a_second=50.0)
    assert simulate(20, 100.0, slow_store) == pytest.approx(50.0 * SHARD / (SHARD + 2), rel=0.05)


def test_a_slow_put_is_hidden_by_the_shard_in_work() -> None:
    slow_put = Constants(driver=0.0, logbook=0.0, round_trip=0.0, put=2.0, puts_a_second=1e12)
    assert simulate(1, 5.0, slow_put, shards_each=100) == pytest.approx(5.0, rel=0.01)
    assert simulate(1, 50.0, slow_put, shards_each=100) < 40.0, "shards of 1.3 s can't hide 6 s"
