"""The README as a newcomer uses it: its files are written, its commands run, in its order, in one folder."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.conftest import CommandLine

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

#: A block of code: its language, what it holds, and the file that the text before it names, as in "`job.yaml`:".
_BLOCK = re.compile(r"(?:`(?P<file>[\w./-]+)`[^`\n]*:\n\n)?```(?P<language>\w+)\n(?P<text>.*?)```", re.DOTALL)


def commands(text: str) -> list[str]:
    """The command lines of a block, without comments."""
    return [" ".join(shlex.split(line, comments=True)) for line in text.splitlines() if line.strip()]


def test_the_readme_is_true_from_its_first_command_to_its_last(sdbatch: CommandLine, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs")
    ran = 0
    for block in _BLOCK.finditer(README):
        if block["file"]:
            (tmp_path / block["file"]).write_text(block["text"], encoding="utf-8")
        elif block["language"] == "sh":
            for command in commands(block["text"]):
                if command.startswith("sdbatch "):
                    sdbatch(*shlex.split(command)[1:])
                    ran += 1
    assert ran > 10


def test_other_commands_of_the_readme_are_targets_of_the_makefile() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    others = [
        command
        for block in _BLOCK.finditer(README)
        if block["language"] == "sh"
        for command in commands(block["text"])
        if not command.startswith("sdbatch ")
    ]
    for command in others:
        program, *rest = command.split()
        assert (program == "make" and rest[0] in targets) or command.startswith("pip install"), command


def test_python_in_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = [block["text"] for block in _BLOCK.finditer(README) if block["language"] == "python"]
    assert blocks
    for text in blocks:
        exec(compile(text, "README.md", "exec"), {})
