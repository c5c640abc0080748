"""A crew that grows and shrinks with the cluster: nodes that come later, that are drained, that vanish."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sdbatch.errors import SpecError
from sdbatch.ledger import read_driver
from sdbatch.spec import Resources, parse_spec
from sdbatch.storage import open_store
from tests.conftest import CommandLine, Shell
from tests.engine.test_deaths import DEADLY
from tests.engine.test_run import generators, kill_everything, sums, wait_for_commits, write_prompts

SMALLEST = {"name": "a", "input": {"uri": "p.csv"}, "output": {"uri": "out"}}
RAY = str(Path(sys.executable).with_name("ray"))


@pytest.mark.parametrize(
    ("written", "fewest", "most"), [(4, 4, 4), ("4", 4, 4), ("2..16", 2, 16), ("1..1", 1, 1), (10_000, 10_000, 10_000)]
)
def test_actors_are_a_number_or_a_range(written: object, fewest: int, most: int) -> None:
    resources = parse_spec({**SMALLEST, "resources": {"actors": written}}).resources
    assert (resources.fewest, resources.most) == (fewest, most)
    assert Resources.model_validate(resources.model_dump(mode="json")) == resources


@pytest.mark.parametrize("written", [0, -1, "0..3", "3..2", "2..", "2...3", "two", 1.5, True, None, [2, 3], 10_001])
def test_what_is_neither_is_refused_with_an_example(written: object) -> None:
    with pytest.raises(SpecError, match=r"resources\.actors: .*write 4 or 2\.\.16"):
        parse_spec({**SMALLEST, "resources": {"actors": written}})


class Nodes:
    """A Ray cluster of several nodes on this machine: a head without CPUs, and workers by name."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.workers: dict[str, subprocess.Popen[str]] = {}
        port = self.address.partition(":")[2]
        self.head = self._start("--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false")

    def _start(self, *options: str) -> subprocess.Popen[str]:
        command = [RAY, "start", "--block", "--disable-usage-stats", "--object-store-memory=100000000", *options]
        return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, text=True, cwd="/")

    def add(self, name: str) -> None:
        """A worker with room for one actor."""
        resources = json.dumps({name: 1})
        self.workers[name] = self._start(f"--address={self.address}", "--num-cpus=1", f"--resources={resources}")

    def ids(self) -> dict[str, str]:
        """Name → Ray's id of each worker that is alive."""
        code = "import json, ray; ray.init(logging_level='ERROR'); print(json.dumps(ray.nodes()))"
        told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        nodes = [node for node in json.loads(told.splitlines()[-1]) if node["Alive"]]
        return {name: node["NodeID"] for node in nodes for name in self.workers if name in node["Resources"]}

    def drain(self, name: str) -> None:
        """Tell Ray that a node is about to go."""
        reason = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot"]
        options = [f"--address={self.address}", f"--node-id={self.ids()[name]}", *reason]
        subprocess.run([RAY, "drain-node", *options], check=True, stdout=subprocess.DEVNULL)

    def working(self, name: str) -> bool:
        return bool(generators(self.workers[name].pid))

    def kill(self, name: str) -> None:
        kill_everything(self.workers.pop(name))

    def end(self) -> None:
        for name in list(self.workers):
            self.kill(name)
        kill_everything(self.head)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else it depends on whether this user has a token already
    started = Nodes()
    monkeypatch.setenv("RAY_ADDRESS", started.address)
    yield started
    started.end()


def wait_until(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 180
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "that never came"
        time.sleep(0.1)


def test_a_job_goes_on_while_nodes_come_are_drained_and_vanish(
    shell: Shell,
    sdbatch: CommandLine,
    write_job: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    write_prompts(tmp_path, 800)  # minutes of work, until it goes quickly
    sections = {"model": {"uri": "builtin:null"}, "resources": {"actors": "1..3", "batch_size": 2}}
    sdbatch("run", write_job(**sections, output={"uri": str(tmp_path / "peace"), "shard_size": 4}))
    job = write_job(**sections, output={"shard_size": 4})
    monkeypatch.setenv("PYTHONPATH", DEADLY)
    monkeypatch.setenv("HOLD_BACK", str(tmp_path / "slowly"))
    (tmp_path / "slowly").touch()
    nodes: Nodes = request.getfixturevalue("nodes")  # not before: this process has a Ray of its own
    store = open_store(str(tmp_path / "out"))
    process = shell.start("run", job, "--json")
    try:
        # The head has no CPUs: the job asks for a node, and says that it waits for one.
        wait_until(lambda: "no node of the cluster has" in str(read_driver(store)), process)
        nodes.add("first")
        wait_for_commits(process, store, 1)
        nodes.add("second")
        wait_until(lambda: nodes.working("second"), process)
        nodes.drain("first")
        wait_until(lambda: not nodes.working("first"), process)  # it got no more shards
        nodes.add("third")
        wait_until(lambda: nodes.working("third"), process)
        nodes.kill("second")
        (tmp_path / "slowly").unlink()
        out, err = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
    assert process.returncode == 0, err
    assert json.loads(out)["actor_deaths"] >= 1
    assert sdbatch.json("verify", "out")["ok"]
    assert sums(store) == sums(open_store(str(tmp_path / "peace")))
