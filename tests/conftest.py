"""What tests share: a job in a temporary folder, the command line, an S3 server."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import hypothesis
import pytest
import torch
import yaml

from sdbatch import cli
from sdbatch.engine.cluster import ray_session
from sdbatch.spec import Resources
from tests.s3_server import serving

torch.set_num_threads(1)
#: Ray's workers give way to everything else, by default; here there is nothing else, and tests would wait for them.
os.environ.setdefault("RAY_worker_niceness", "0")
#: Speeds of jobs run here are none of the user's record.
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).parents[1] / ".work/tests-cache")
#: Metrics are told every ten seconds, by default.
os.environ.setdefault("RAY_metrics_report_interval_ms", "1000")
hypothesis.settings.register_profile("sdbatch", deadline=None, derandomize=True)
hypothesis.settings.load_profile("sdbatch")

Json = dict[str, Any]

_OWN_RAY, _RAY = "own ray", "ray"


def pytest_itemcollected(item: pytest.Item) -> None:
    """Tests that share a Ray stay on one of pytest's workers, as do those that start their own: never more than two."""
    names = set(getattr(item, "fixturenames", ()))
    group = _OWN_RAY if "shell" in names else _RAY if "ray_here" in names else item.nodeid.partition("::")[0]
    item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The two long groups come first, one for each worker; what is short fills up the rest."""

    def place(item: pytest.Item) -> int:
        group = next(item.iter_markers("xdist_group")).args[0]
        return (_OWN_RAY, _RAY, group).index(group)

    items.sort(key=place)


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str


class CommandLine:
    """``sdbatch`` as a function: the same code in this process, on the tests' own Ray, seconds sooner."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *arguments: str | Path, code: int = 0) -> Ended:
        ended = self._run([str(argument) for argument in arguments])
        assert ended.code == code, f"exit code {ended.code}, not {code}\n{ended.stdout}\n{ended.stderr}"
        assert "Traceback" not in ended.stderr, ended.stderr
        return ended

    def json(self, *arguments: str | Path, code: int = 0) -> Any:
        return json.loads(self(*arguments, "--json", code=code).stdout)

    def _run(self, arguments: list[str]) -> Ended:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.chdir(self.folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.call(arguments)
        return Ended(code, out.getvalue(), err.getvalue())


class Shell(CommandLine):
    """``sdbatch`` in a process of its own with a Ray of its own, as a user runs it, and as it can be killed."""

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "sdbatch", *map(str, arguments)],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def _run(self, arguments: list[str]) -> Ended:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=300)
        return Ended(process.returncode, out, err)


@pytest.fixture(scope="session")
def ray_here(s3_server: str) -> Iterator[None]:
    """Ray in this process, for all tests that need not kill it. Its workers know the S3 server."""
    with ray_session(Resources(actors=3)):
        yield


@pytest.fixture
def sdbatch(tmp_path: Path, ray_here: None) -> CommandLine:
    return CommandLine(tmp_path)


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


@pytest.fixture
def write_job(tmp_path: Path) -> Callable[..., Path]:
    """Writes job.yaml: a small, quick job on the built-in model, with sections overridden by keyword."""

    def write(**sections: Json) -> Path:
        spec: Json = {
            "name": "test",
            "input": {"uri": str(tmp_path / "prompts.csv")},
            "model": {"uri": "builtin:shapes"},
            "generate": {"num_inference_steps": 2, "seed": 7},
            "output": {"uri": str(tmp_path / "out"), "shard_size": 8},
            "resources": {"actors": 1, "batch_size": 4},
        }
        for name, section in sections.items():
            spec[name] = {**spec.get(name, {}), **section} if isinstance(section, dict) else section
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The endpoint of an S3 server; the AWS variables point at it."""
    with serving() as settings:
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        yield settings["AWS_ENDPOINT_URL"]
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture
def bucket(s3_server: str) -> str:
    """A new bucket's name."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    boto3.client("s3").create_bucket(Bucket=name)
    return name
