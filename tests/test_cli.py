"""The command line itself: help for everything, the schema, the version, texts of users in a terminal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from PIL import Image

from sdbatch import __version__, cli
from sdbatch.diffusion import LatentDiffusion, Lora
from sdbatch.errors import Interrupted

COMMANDS = (
    "validate",
    "plan",
    "run",
    "submit",
    "schedule",
    "doctor",
    "status",
    "watch",
    "verify",
    "duplicates",
    "errors",
    "retry",
    "repair",
    "report",
    "remake",
    "export",
    "inspect",
    "bench",
    "evaluate",
    "train",
    "finetune",
    "schema",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.call([command, "--help"]) == 0
    assert len(capsys.readouterr().out) > 100


def test_the_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    cli.call(["--help"])
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)
    assert {command.callback.__name__ for command in cli.app.registered_commands if command.callback} == set(COMMANDS)


def test_schema_prints_json_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.call(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["properties"]) >= {"name", "input", "model", "generate", "output", "failures", "resources"}


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.call(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"sdbatch {__version__}"


@pytest.mark.parametrize(
    "arguments",
    [["statos"], ["status"], ["run", "a", "b"], ["report", "x", "--limit", "0"], ["watch", "x", "--every", "0"]],
)
def test_usage_errors_end_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.call(arguments) == 2
    assert "sdbatch --help" in capsys.readouterr().err


def test_errors_come_as_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.call(["status", "nowhere/at/all", "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert told["kind"] == "OutputError"
    assert "holds no job" in told["error"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["finetune", "builtin:shapes", "no-such-folder", "out"], "no-such-folder does not exist"),
        (["finetune", "builtin:nothing", "pictures", "out"], "builtin:nothing"),
        (["finetune", "builtin:shapes", "pictures", "out", "--resolution", "50"], "resolution is 50"),
        (["finetune", "builtin:shapes", "pictures", "out", "--device", "cuda"], "there is no CUDA device here"),
        (["train", "pictures/red.png"], "pictures/red.png"),
    ],
)
def test_what_cannot_be_trained_is_told_at_once(
    arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "pictures/red.png")
    (tmp_path / "pictures/red.txt").write_text("a red square")
    assert cli.call(arguments) == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_finetune_leaves_a_lora_that_a_job_can_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (64, 64), "red").save(pictures / "red.png")
    (pictures / "red.txt").write_text("a red square")
    options = ["--steps", "1", "--rank", "2", "--batch", "1", "--sample-prompt", "a red square"]
    assert cli.call(["finetune", "builtin:shapes", str(pictures), str(tmp_path / "out"), *options]) == 0
    told = capsys.readouterr().err
    spec = yaml.safe_load("{" + told.partition("model: ")[2].strip().join(("model: ", "}")))["model"]
    LatentDiffusion.from_pretrained(spec["uri"], adaptations=[Lora(Path(spec["loras"][0]["uri"]), 1.0)])


@pytest.mark.parametrize("disguised", [False, True])
def test_a_signal_ends_with_130_wherever_it_strikes(
    disguised: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of what a signal raises within its own calls Ray makes other errors."""

    def strike(*arguments: object) -> None:
        try:
            cli._interrupt(signal.SIGTERM, None)
        except Interrupted:
            if disguised:
                raise SystemError("returned a result with an exception set") from None
            raise

    monkeypatch.setattr(cli, "_asked_to_stop", threading.Event())
    monkeypatch.setattr("sdbatch.cli.jobs.load_spec", strike)
    assert cli.call(["run", "job.yaml"]) == 130
    assert "stopped by a signal" in capsys.readouterr().err


@pytest.mark.parametrize(("shell", "variable"), [("bash", "COMP_WORDS"), ("zsh", "_TYPER_COMPLETE_ARGS")])
def test_shells_complete_commands_and_options(shell: str, variable: str) -> None:
    """What the scripts of --install-completion run at every press of the tab key."""
    for typed, cword, expected in (("sdbatch sche", "1", "schedule"), ("sdbatch run --ext", "2", "--extend")):
        env = {**os.environ, "_SDBATCH_COMPLETE": f"complete_{shell}", variable: typed, "COMP_CWORD": cword}
        told = subprocess.run([sys.executable, "-m", "sdbatch"], env=env, capture_output=True, text=True, check=True)
        assert expected in told.stdout
