"""Small models of every family, saved by diffusers once a session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from sdbatch.diffusion import open_checkpoint
from tests.diffusion.families import build_pipeline


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's small model, as diffusers saves it, or of the built-in one ("shapes")."""

    @cache
    def find(name: str) -> Path:
        if name == "shapes":
            return open_checkpoint("builtin:shapes").path
        folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
        build_pipeline(name, folder / "spelling").save_pretrained(folder / "model")
        return folder / "model"

    return find
