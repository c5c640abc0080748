"""What the documents name is there."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from sdbatch.diffusion import SAMPLERS
from sdbatch.spec import JobSpec
from tests.test_cli import COMMANDS

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "AGENTS.md", *sorted((ROOT / "docs").glob("*.md"))]

#: The functions that write the reference pages.
REFERENCE = runpy.run_path(str(ROOT / "docs/_site/reference.py"))


def names_in(path: Path) -> set[str]:
    """Every function, class, method and constant of a file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            methods = (inner for inner in node.body if isinstance(inner, ast.FunctionDef))
            fields = (inner.target for inner in node.body if isinstance(inner, ast.AnnAssign))
            found |= {f"{node.name}.{method.name}" for method in methods}
            found |= {f"{node.name}.{field.id}" for field in fields if isinstance(field, ast.Name)}
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        if isinstance(node, ast.Name):
            found.add(node.id)
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def test_the_walk_through_the_formulas_names_code_that_is_there() -> None:
    text = (ROOT / "docs/from-formulas-to-code.md").read_text(encoding="utf-8")
    known = {name for path in (ROOT / "sdbatch").rglob("*.py") for name in names_in(path)}
    files = {path.name for path in (ROOT / "sdbatch").rglob("*.py")}
    for word in re.findall(r"`([A-Za-z_][\w./]*)`", re.sub(r"\(\.\.[^)]*\)", "", text)):
        if word.endswith(".py"):
            assert word.rpartition("/")[2] in files, word
        elif not (ROOT / word).exists():
            assert word in known | SETTINGS, word


def test_the_threat_model_points_at_tests_that_are_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs/threat-model.md").read_text(encoding="utf-8")))
    assert named
    assert named <= {name for path in (ROOT / "tests").rglob("test_*.py") for name in names_in(path)}


SETTINGS = {field for section in JobSpec.model_json_schema()["$defs"].values() for field in section["properties"]} | {
    "rescale_betas_zero_snr",
    *SAMPLERS,
}


def test_the_readme_names_every_command_and_section_of_the_spec() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"sdbatch {command}" in readme for command in COMMANDS)
    assert all(f"`{section}`" in readme for section in JobSpec.model_fields)


@pytest.mark.parametrize("page", ["commands", "spec"])
def test_the_reference_says_what_the_code_does(page: str) -> None:
    written = (ROOT / f"docs/reference/{page}.md").read_text(encoding="utf-8")
    assert written == REFERENCE[page](), "bring it up to date: python docs/_site/reference.py"


def test_every_field_option_and_argument_says_what_it_is_for() -> None:
    for line in REFERENCE["spec"]().splitlines():
        assert not re.fullmatch(r"\| `.*\|\s*\|", line), line
    for line in REFERENCE["commands"]().splitlines():
        assert not line.startswith("* `") or ": " in line, line


def test_the_site_is_built_and_every_link_leads_somewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "properdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "<math" in (tmp_path / "from-formulas-to-code.html").read_text(encoding="utf-8")
    for document in DOCUMENTS[2:]:
        assert f"{document.stem}.html" in (tmp_path / "index.html").read_text(encoding="utf-8"), document
