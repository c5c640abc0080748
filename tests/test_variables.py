"""Variables in a job spec, filled in once as it is read."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import yaml

from sdbatch import cli
from sdbatch.errors import SpecError
from sdbatch.spec import load_spec, parse_spec
from tests.conftest import CommandLine

NEW_YEAR = datetime.date(2027, 1, 1)  # the last Friday of the 53rd week of 2026


def write(path: Path, **fields: object) -> Path:
    spec = {"name": "weekly", "input": {"uri": "prompts.csv"}, "output": {"uri": "out"}, **fields}
    (path / "job.yaml").write_text(yaml.safe_dump(spec), encoding="utf-8")
    return path / "job.yaml"


def test_every_variable_is_filled_in_as_of_the_date(tmp_path: Path) -> None:
    job = write(
        tmp_path,
        name="weekly-{week}",
        input={"uri": "s3://in/{year}/{month}/{day}.csv"},
        model={"uri": "/models/{week}", "loras": [{"uri": "/loras/{date}.safetensors"}]},
        output={"uri": "s3://out/{name}/{date}/{{kept}}"},
    )
    spec = load_spec(job, date=NEW_YEAR)
    assert spec.name == "weekly-2026-W53"
    assert spec.input.uri == "s3://in/2027/01/01.csv"
    assert spec.model.uri == "/models/2026-W53"
    assert spec.model.loras[0].uri == "/loras/2027-01-01.safetensors"
    assert spec.output.uri == "s3://out/weekly-2026-W53/2027-01-01/{kept}"
    assert parse_spec(spec.model_dump(mode="json")) == spec  # what is frozen is not filled in again


def test_overrides_may_hold_variables_and_other_fields_may_not(tmp_path: Path) -> None:
    job = write(tmp_path, generate={"negative_prompt": "{date}"})
    spec = load_spec(job, ["output.uri=out/{date}"], NEW_YEAR)
    assert spec.output.uri == "out/2027-01-01"
    assert spec.generate.negative_prompt == "{date}"


def test_without_a_date_it_is_today_in_utc(tmp_path: Path) -> None:
    before = datetime.datetime.now(datetime.UTC).date()
    found = load_spec(write(tmp_path, output={"uri": "out/{date}"})).output.uri
    assert found in {f"out/{before}", f"out/{datetime.datetime.now(datetime.UTC).date()}"}


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    job = write(
        tmp_path,
        name="{name}",
        input={"uri": "prompts-{dat}.csv", "limit": 0},
        model={"loras": [{"uri": "a"}, {"uri": "b{"}]},
        output={"uri": "out/{}/{\x07}"},
    )
    with pytest.raises(SpecError) as caught:
        load_spec(job)
    told = [str(problem) for problem in caught.value.problems]
    assert "name: knows no variable 'name' (there is: date, year, month, day, week)" in told
    assert "input.uri: knows no variable 'dat' (did you mean 'date'?)" in told
    assert "model.loras.1.uri: has a single { (write {{ for a brace)" in told
    assert "output.uri: knows no variable '' (there is: name, date, year, month, day, week)" in told
    assert any(problem.startswith("input.limit: is 0") for problem in told)
    assert all(text.isprintable() for text in told)


def test_a_name_with_a_path_never_reaches_the_output(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"name: is '\.\./\.\./etc'"):
        load_spec(write(tmp_path, name="../../etc", output={"uri": "out/{name}"}))


def test_a_day_that_is_none_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.call(["run", str(write(tmp_path)), "--date", "2026-13-01"]) == 2
    assert "2026-13-01" in capsys.readouterr().err


def test_again_on_the_same_day_is_complete_and_another_day_is_another_output(
    sdbatch: CommandLine, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    job = write(
        tmp_path,
        input={"uri": "prompts.txt"},
        model={"uri": "builtin:null"},
        output={"uri": str(tmp_path / "out/{name}/{date}")},
    )
    made = sdbatch.json("run", job, "--date", "2026-11-23")
    assert (made["output"], made["made_now"]) == (str(tmp_path / "out/weekly/2026-11-23"), 1)
    again = sdbatch.json("run", job, "--date", "2026-11-23")
    assert (again["state"], again["made_now"]) == ("complete", 0)
    assert sdbatch.json("run", job, "--date", "2026-11-30")["made_now"] == 1
    frozen = yaml.safe_load((tmp_path / "out/weekly/2026-11-30/_sdbatch/job.yaml").read_text())
    assert frozen["spec"]["output"]["uri"] == str(tmp_path / "out/weekly/2026-11-30")
