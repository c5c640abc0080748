"""What is written for cron, systemd, Kubernetes and KubeRay, read as these read it."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdbatch import cli
from sdbatch.engine.cron import read_cron
from sdbatch.errors import UsageError
from tests.cluster.schemas import check_kuberay, check_kubernetes
from tests.programs import needs

ODD = "generate.negative_prompt='100% \"blur\" $HOME $(x) \\ é'"


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "Weekly job.yaml"
    path.write_text("name: weekly\ninput: {uri: s3://in/{date}.csv}\noutput: {uri: 's3://out/{name}/{date}'}\n")
    path.write_text(path.read_text().replace("s3://in/{date}.csv", "'s3://in/{date}.csv'"))
    return path


def written(capsys: pytest.CaptureFixture[str], job: Path, *options: str, code: int = 0) -> str:
    assert cli.call(["schedule", str(job), "--cron", "0 6 * * 1", *options]) == code
    told = capsys.readouterr()
    return told.err if code else told.out


def test_a_crontab_line_runs_the_job_where_it_was_written(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = written(capsys, job, "--set", ODD)
    assert line.startswith("0 6 * * 1 cd ")
    assert line.count("\n") == 1
    command = line.removeprefix("0 6 * * 1 ").strip().replace("\\%", "%")  # as cron hands it to the shell
    words = shlex.split(command)
    assert words[:3] == ["cd", str(job.parent), "&&"]
    assert words[3:-2] == [sys.executable, "-m", "sdbatch", "run", str(job), "--set", ODD]
    assert "%" not in line.replace("\\%", "")


def test_systemd_finds_no_fault_and_reads_the_words_back(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = written(capsys, job, "--as", "systemd", "--set", ODD)
    service, timer = text.split("# ~/.config/systemd/user/sdbatch-weekly-job.timer\n")
    assert "ExecStart=" in service
    for ending, unit in (("service", service), ("timer", timer)):
        (tmp_path / f"sdbatch-weekly-job.{ending}").write_text(unit)
    needs("systemd-analyze")
    units = [str(tmp_path / f"sdbatch-weekly-job.{ending}") for ending in ("service", "timer")]
    found = subprocess.run(["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True)
    ours = [line for line in found.stderr.splitlines() if "sdbatch-weekly-job" in line]
    assert not ours, found.stderr


@pytest.mark.parametrize(
    ("expression", "calendar"),
    [
        ("0 6 * * 1", ["Mon *-*-* 06:00:00 UTC"]),
        ("*/15 * * * *", ["*-*-* *:00,15,30,45:00 UTC"]),
        ("0 0 1,15 jan-mar *", ["*-01,02,03-01,15 00:00:00 UTC"]),
        ("5 4 13 * fri", ["*-*-13 04:05:00 UTC", "Fri *-*-* 04:05:00 UTC"]),  # cron: the 13th, and every Friday
        ("0 12 * * 0,7", ["Sun *-*-* 12:00:00 UTC"]),
    ],
)
def test_systemd_is_told_the_same_times_as_cron(expression: str, calendar: list[str]) -> None:
    assert read_cron(expression).calendar() == calendar
    if shutil.which("systemd-analyze"):
        subprocess.run(["systemd-analyze", "calendar", *calendar], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("expression", "told"),
    [
        ("", "five fields"),
        ("@weekly", "five fields"),
        ("0 6 * * 1 *", "five fields"),
        ("60 6 * * 1", "the minute is '60'; it goes from 0 to 59"),
        ("0 six * * 1", "the hour is 'six'"),
        ("0 6 * * mon-", "the day of the week is 'mon-'"),
        ("0 6 5-3 * *", "stands for nothing"),
        ("*/0 6 * * *", "stands for nothing"),
        ("0 6 30 feb *", "never comes"),
    ],
)
def test_a_wrong_expression_is_told(expression: str, told: str, job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=r"--cron: "):
        read_cron(expression)
    assert cli.call(["schedule", str(job), "--cron", expression]) == 2
    assert told in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("address", [[], ["--address", "http://head:8265"]])
def test_a_cron_job_is_as_kubernetes_wants_it(
    address: list[str], job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = list(yaml.safe_load_all(written(capsys, job, "--as", "kubernetes", "--set", ODD, *address)))
    for manifest in documents:
        check_kubernetes(manifest)
    config, cron = documents
    assert config["data"]["job.yaml"] == job.read_text()
    (container,) = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    command = ["submit" if address else "run", "/job/job.yaml", "--set", ODD.replace("$(", "$$("), *address]
    assert container["command"] == ["python", "-m", "sdbatch", *command, *(["--wait"] if address else [])]


def test_a_ray_cron_job_is_as_kuberay_wants_it(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpus = ["--set", "resources.gpus_per_actor=1", "--set", "resources.actors=2..8"]
    config, cron = yaml.safe_load_all(written(capsys, job, "--as", "rayjob", *gpus))
    check_kubernetes(config)
    check_kuberay(cron)
    assert shlex.split(cron["spec"]["jobTemplate"]["entrypoint"])[:5] == [
        *("python", "-m", "sdbatch", "run", "/job/job.yaml")
    ]
    (workers,) = cron["spec"]["jobTemplate"]["rayClusterSpec"]["workerGroupSpecs"]
    assert workers["maxReplicas"] == 8
    assert workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--as", "kubernetes", "--set", "input.uri=prompts.csv"], "input.uri: is 'prompts.csv'"),
        (["--set", "output.uri=out/{weak}"], "did you mean 'week'?"),
        (["--set", "generate.negative_prompt='a\n\n b'"], "cron knows no line breaks"),
        (["--as", "systemd", "--set", "generate.negative_prompt='a\n\n b'"], "a unit knows no control characters"),
        (["--as", "rayjob", "--address", "http://head:8265"], "a RayCronJob brings its own cluster"),
        (["--as", "anacron"], "anacron"),
        (["--to", "no/such/folder/x"], "--to: no/such/folder/x can't be written"),
    ],
)
def test_what_cannot_be_scheduled_is_told(
    options: list[str], told: str, job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told in " ".join(written(capsys, job, *options, code=2).split())


def test_it_goes_to_a_file_or_comes_as_json(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = written(capsys, job)
    assert written(capsys, job, "--to", str(tmp_path / "line")) == ""
    assert (tmp_path / "line").read_text() == line
    told: Any = yaml.safe_load(written(capsys, job, "--json"))
    assert told == {"as": "crontab", "cron": "0 6 * * 1", "text": line}
