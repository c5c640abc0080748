"""Programs that tests look at results with; ``make system-packages`` brings them."""

from __future__ import annotations

import shutil

import pytest


def needs(program: str) -> None:
    """Skip the test where the program is not to be had: without Debian's packages, root and sudo."""
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed here; on Debian as root, 'make system-packages' brings it")
