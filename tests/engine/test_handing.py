"""Who gets the next shard."""

from __future__ import annotations

import pytest

from sdbatch.engine.handing import HELD, takes_another


def ending(seconds: list[float], shards: int) -> float:
    """When the last of ``shards`` is done by actors that take so many seconds each, by the pool's rule."""
    held, free, ends = [0] * len(seconds), [0.0] * len(seconds), list[tuple[float, int]]()
    now = 0.0
    while shards or ends:
        for already in range(HELD):
            for actor, takes in enumerate(seconds):
                if held[actor] <= already and takes_another(already, shards, len(seconds)):
                    shards, held[actor] = shards - 1, held[actor] + 1
                    free[actor] = max(free[actor], now) + takes
                    ends.append((free[actor], actor))
        now, actor = ends.pop(ends.index(min(ends)))
        held[actor] -= 1
    return now


def test_who_is_alone_always_has_one_waiting() -> None:
    assert [takes_another(0, todo, 1) for todo in (0, 1)] == [False, True]
    assert [takes_another(1, todo, 1) for todo in (0, 1)] == [False, True]


def test_at_the_end_shards_go_to_who_is_free() -> None:
    assert takes_another(0, 1, 3)
    assert [takes_another(1, todo, 3) for todo in (1, 2, 3)] == [False, False, True]
    assert [takes_another(2, todo, 3) for todo in (3, 4, 5)] == [False, False, True]
    assert ending([1.0, 1.0, 1.0], 9) == 3.0
    assert ending([1.0, 1.7], 5) == pytest.approx(3.4)  # two wait at nobody: the fast one makes three
    assert ending([1.0, 1.5, 3.5], 6) == pytest.approx(3.5)
