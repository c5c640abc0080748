"""The evaluate command from end to end, on Ray, with the built-in model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdbatch.evaluation.prompts import CELLS
from sdbatch.storage import open_store
from tests.conftest import CommandLine

SMALL = ("--prompts-per-cell", "2", "--steps", "2", "--sampler", "euler", "--sampler", "dpmpp_2m")
RESOURCES = ("--set", "resources.actors=1", "--set", "resources.batch_size=4")


def check(found: dict[str, Any], output: Path) -> None:
    assert json.loads((output / "fidelity.json").read_text()) == {
        name: value for name, value in found.items() if name not in {"output", "made_now"}
    }
    assert (found["pictures"], found["quarantined"], found["prompts_per_cell"]) == (16, 0, 2)
    assert [setting["sampler"] for setting in found["settings"]] == ["euler", "dpmpp_2m"]
    for setting in found["settings"]:
        assert (setting["num_inference_steps"], setting["guidance_scale"]) == (2, 5.0)
        assert [cell["cell"] for cell in setting["cells"]] == list(CELLS)
        for cell in setting["cells"]:
            assert cell["n"] == cell["shifted"]["n"] == 2
            assert all(rate["n"] == 2 for rate in cell["rates"].values())
            assert ("place" in cell["rates"]) != ("relation" in cell["rates"])


def test_a_model_is_evaluated_and_again_without_making_a_picture(sdbatch: CommandLine, tmp_path: Path) -> None:
    output = tmp_path / "out"
    ended = sdbatch("evaluate", "builtin:shapes", output, *SMALL, *RESOURCES)
    assert "16 pictures" in ended.stderr
    assert ended.stdout == ""
    assert {path.name for path in output.iterdir()} - {"_sdbatch"} == {
        "prompts.parquet",
        "pictures",
        "fidelity.json",
        "fidelity.md",
        "fidelity.png",
        "sheet.png",
    }
    for name in ("fidelity.png", "sheet.png"):
        with Image.open(output / name) as picture:
            assert min(picture.size) > 400
    assert sdbatch.json("verify", output / "pictures")["ok"]

    again = sdbatch.json("evaluate", "builtin:shapes", output, *SMALL, *RESOURCES)
    assert again["made_now"] == 0
    check(again, output)

    told = sdbatch("evaluate", "builtin:shapes", output, *SMALL, "--seed", "1", *RESOURCES, code=2)
    assert "choose another output" in told.stderr
    assert sdbatch.json("verify", output / "pictures")["ok"]


def test_pictures_that_can_not_be_made_end_with_3(sdbatch: CommandLine, tmp_path: Path) -> None:
    found = sdbatch.json(
        *("evaluate", "builtin:shapes", tmp_path / "out", "--prompts-per-cell", "1"),
        *("--sampler", "euler", "--sampler", "lcm", "--steps", "60", *RESOURCES),
        code=3,
    )
    assert (found["pictures"], found["quarantined"]) == (4, 4)
    assert [setting["sampler"] for setting in found["settings"]] == ["euler"]
    assert all(cell["shifted"] is None for cell in found["settings"][0]["cells"])


def test_results_can_lie_in_a_bucket(sdbatch: CommandLine, bucket: str) -> None:
    output = f"s3://{bucket}/evaluation"
    found = sdbatch.json(
        *("evaluate", "builtin:shapes", output, "--prompts-per-cell", "1", "--steps", "1"),
        *("--set", "output.format=parquet", *RESOURCES),
    )
    assert (found["output"], found["pictures"]) == (output, 4)
    keys = {entry.key for entry in open_store(output).list()}
    assert keys >= {"prompts.parquet", "fidelity.json", "fidelity.md", "fidelity.png", "sheet.png"}


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (("--sampler", "eulr"), "did you mean 'euler'"),
        (("--steps", "0"), "generate.num_inference_steps"),
        (("--guidance", "-1"), "generate.guidance_scale"),
        (("--set", "generate.sampler=euler"), "--sampler"),
        (("--set", "input.columns.id=x"), "leave it out"),
        (("--set", "resources.actrs=1"), "did you mean 'actors'"),
    ],
)
def test_a_mistake_is_told_with_its_remedy_before_anything_is_written(
    arguments: tuple[str, ...], remedy: str, sdbatch: CommandLine, tmp_path: Path
) -> None:
    told = sdbatch("evaluate", "builtin:shapes", tmp_path / "out", *arguments, code=2)
    assert remedy in told.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["scipy", "matplotlib"])
def test_without_the_extra_the_remedy_is_told(package: str, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.modules[{package!r}] = None; from sdbatch import cli; "
        f"sys.exit(cli.call(['evaluate', 'builtin:shapes', {str(tmp_path / 'out')!r}]))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 2, ended.stderr
    assert package in ended.stderr
    assert "pip install 'sdbatch[training]'" in ended.stderr
