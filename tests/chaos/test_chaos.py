"""The run under fire, a short one: the whole of it is ``make chaos``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.__main__ import under_fire


@pytest.mark.usefixtures("shell")  # it starts drivers as that does
def test_a_job_under_fire_ends_as_one_in_peace(tmp_path: Path) -> None:
    figures = under_fire(tmp_path, images=96, seconds=10, pause=4, seed=3, steps=2)
    assert figures.ok, figures
    assert sum(figures.strokes.values()) > 0
    assert figures.faults["503 SlowDown"] > 0
