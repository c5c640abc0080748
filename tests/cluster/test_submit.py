"""Jobs on a Ray cluster: a real head of its own on this machine, spoken to as one far away."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from sdbatch import cli
from sdbatch.engine import cluster
from sdbatch.engine.submission import submission_of
from sdbatch.spec import load_spec, today
from sdbatch.storage import open_store
from tests.conftest import CommandLine, Shell
from tests.engine.test_run import kill_everything

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def head(tmp_path: Path) -> Iterator[str]:
    """The address of a Ray head's dashboard."""
    folder = tempfile.mkdtemp(prefix="head-")  # short: Ray makes sockets below it
    port = free_port()
    ports = [f"--port={free_port()}", f"--dashboard-port={port}", f"--ray-client-server-port={free_port()}"]
    options = ["--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1", "--num-cpus=2", f"--temp-dir={folder}"]
    ray = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"]
    env = {
        **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "RAY_AUTH_MODE": "disabled",
        "RAY_JOB_STOP_WAIT_TIME_S": "60",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    with (tmp_path / "head.log").open("wb") as log:
        options += [f"--dashboard-agent-listen-port={free_port()}"]
        process = subprocess.Popen([*ray, *ports, *options], env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        kill_everything(process)
        shutil.rmtree(folder, ignore_errors=True)


def client_of(head: str, tmp_path: Path) -> JobSubmissionClient:
    """Speaks to the head once it answers."""
    deadline = time.monotonic() + 90
    while True:
        try:
            client = JobSubmissionClient(head)
            client.list_jobs()
        except (ConnectionError, RuntimeError):
            assert time.monotonic() < deadline, (tmp_path / "head.log").read_text()
            time.sleep(0.5)
        else:
            return client


def test_a_job_is_sent_found_again_left_alone_stopped_and_ended(
    head: str, shell: Shell, write_job: Callable[..., Path], tmp_path: Path
) -> None:
    rows = "".join(f"a red circle {i}\n" for i in range(40))
    (tmp_path / "prompts.csv").write_text("prompt\n" + rows + '""\n')  # the last can't be made
    job = write_job(generate={"num_inference_steps": 40}, resources={"actors": 1})
    client = client_of(head, tmp_path)
    submit = CommandLine(tmp_path)
    sent = submit.json("submit", job, "--address", head)
    assert sent["attached"] is False
    assert sent["id"].startswith("sdbatch-test-")
    again = submit.json("submit", job, "--address", head)
    assert (again["id"], again["attached"]) == (sent["id"], True)

    store = open_store(str(tmp_path / "out"))
    waiting = shell.start("submit", job, "--address", head, "--wait")
    while not list(store.list("_sdbatch/commits/")):
        assert client.get_job_status(sent["id"]) in {JobStatus.PENDING, JobStatus.RUNNING}, client.get_job_logs(
            sent["id"]
        )
        time.sleep(0.2)
    waiting.send_signal(signal.SIGINT)
    _, told = waiting.communicate(timeout=60)
    assert waiting.returncode == 130
    assert f"{sent['id']} goes on" in told
    assert "Running entrypoint" in told  # its log
    assert client.get_job_status(sent["id"]) == JobStatus.RUNNING

    client.stop_job(sent["id"])
    stopped = submit.json("submit", job, "--address", head, "--wait", code=130)
    assert stopped["id"] == sent["id"]
    assert "what is committed stays" in client.get_job_logs(sent["id"])
    assert submit.json("status", "out")["state"] == "incomplete"

    ended = submit.json("submit", job, "--address", head, "--wait", code=3)
    assert (ended["id"], ended["attached"], ended["exit_code"]) == (f"{sent['id']}-2", False, 3)
    status = submit.json("status", "out")
    assert (status["state"], status["committed"], status["quarantined"]) == ("complete", 40, 1)


def test_the_same_job_has_the_same_id_whatever_the_day(write_job: Callable[..., Path]) -> None:
    job = write_job()
    spec, text = load_spec(job), job.read_bytes()
    first = submission_of(spec, text, [], today(), extend=False)
    assert first.id == submission_of(spec, text, [], today().replace(year=2020, day=1), extend=False).id
    assert first.id != submission_of(spec, text, [], today(), extend=True).id
    other = load_spec(job, ["output.uri=/elsewhere"])
    assert first.id != submission_of(other, text, ["output.uri=/elsewhere"], today(), extend=False).id
    odd = submission_of(spec, text, ["generate.negative_prompt='$(x)'"], today(), extend=False)
    assert odd.entrypoint.startswith("exec python -m sdbatch run job.yaml --set 'generate.negative_prompt=")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--address", "http://host:port"], "no Ray job server at http://host:port"),
        (["--address", "127.0.0.1:8265"], "should be the cluster's dashboard"),
        (["--address", "http://127.0.0.1:1", "--set", "input.uri=here.csv"], "input.uri: is 'here.csv'"),
        (["--address", "http://127.0.0.1:1", "--set", "model.loras=[{uri: a}]"], "model.loras.0.uri: is 'a'"),
        (
            ["--address", "http://127.0.0.1:1", "--set", "checks={clip_score: {model: clip}}"],
            "checks.clip_score.model: is 'clip'",
        ),
        ([], "address"),
    ],
)
def test_what_cannot_be_sent_is_told(
    options: list[str],
    told: str,
    write_job: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    assert cli.call(["submit", str(write_job()), *options]) == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_a_cluster_out_of_reach_is_no_mistake(
    write_job: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Schedules start again what ended with 1, never what ended with 2."""
    assert cli.call(["submit", str(write_job()), "--address", "http://127.0.0.1:1"]) == 1
    assert "no Ray job server at http://127.0.0.1:1" in " ".join(capsys.readouterr().err.split())
    for error, code in (
        (ConnectionError("ray client connection timeout"), 1),
        (RuntimeError("Failed to get node info"), 1),
        (RuntimeError("Version mismatch: The cluster was started with: Ray: 2.0"), 2),
        (AuthenticationError("Token authentication is enabled"), 2),
        (ValueError("Invalid address format: nonsense"), 2),
    ):
        assert cluster._not_joined(error, str(error)).exit_code == code
