"""The house rules that a machine can check: who imports whom, and what must stay out."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sdbatch"

#: Room → the rooms it may import.
MAY_IMPORT = {
    "errors": set(),
    "spec": {"errors"},
    "diffusion": {"errors"},
    "storage": {"errors"},
    "prompts": {"errors", "spec", "storage"},
    "outputs": {"errors", "spec", "storage"},
    "ledger": {"errors", "spec", "storage"},
    "dataset": {"errors", "spec", "storage", "outputs", "ledger"},
    "checks": {"errors", "spec", "diffusion"},
    "engine": {"errors", "spec", "diffusion", "storage", "prompts", "outputs", "ledger", "dataset", "checks"},
    "report": {"errors", "ledger", "storage"},
    "bench": {"errors", "diffusion"},
    "training": {"errors", "diffusion"},
    "evaluation": {"errors", "spec", "diffusion", "storage", "prompts", "outputs", "ledger", "engine", "training"},
    "cli": {
        "errors",
        "spec",
        "diffusion",
        "storage",
        "prompts",
        "outputs",
        "ledger",
        "dataset",
        "checks",
        "engine",
        "report",
        "bench",
        "training",
        "evaluation",
    },
}
#: Rooms within the engine → which of them, and of what lies beside them, they may import.
WITHIN_ENGINE = {
    "models": {"models"},
    "planning": {"planning", "machine", "models"},
    "costs": {"costs", "handing"},
    "making": {"making", "planning", "models", "costs", "cluster", "handing"},
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem in MAY_IMPORT)


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    room = parts[0]
    rooms = {name.split(".")[1] for name in imports(path) if name.startswith("sdbatch.")}
    used = {name for name in rooms if name in MAY_IMPORT} - {room}
    assert used <= MAY_IMPORT[room], f"{room} imports {sorted(used - MAY_IMPORT[room])}"


@pytest.mark.parametrize("room", WITHIN_ENGINE)
def test_so_they_do_within_the_engine(room: str) -> None:
    for path in (PACKAGE / "engine" / room).rglob("*.py"):
        used = {name.split(".")[2] for name in imports(path) if name.startswith("sdbatch.engine.")}
        assert used <= WITHIN_ENGINE[room], f"{path} imports {sorted(used - WITHIN_ENGINE[room])}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_oracle_and_no_pickle_in_the_package(path: Path) -> None:
    rival = {"diffusers", "transformers"} if path == PACKAGE / "bench/rival.py" else set()
    for name in imports(path):
        assert name.split(".")[0] not in {"diffusers", "transformers", "pickle", "moto"} - rival
    assert not re.search(r"\btorch\.load\(", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("room", ["diffusion", "training"])
def test_model_and_trainer_need_no_ray(room: str) -> None:
    code = f"import sys; sys.modules['ray'] = None; import sdbatch.{room}; from sdbatch.training import trainer"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tests_that_take_a_ray_stay_on_one_worker(request: pytest.FixtureRequest) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        pytest.skip("pytest runs without workers")
    assert request.node.nodeid.endswith(f"@{request.node.nodeid.partition('::')[0]}")
