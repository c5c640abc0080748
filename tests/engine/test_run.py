"""Whole jobs by the command line, on Ray, with the built-in model: made, resumed, killed, refused."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from sdbatch.diffusion import LatentDiffusion
from sdbatch.prompts import image_seed
from sdbatch.storage import LocalStore, Store, open_store
from tests.conftest import CommandLine, Shell
from tests.drawn import drawn
from tests.report.reading import read_report

Write = Callable[..., Path]
COLOURS = ("red", "green", "blue", "black")


def write_prompts(folder: Path, count: int) -> None:
    rows = "".join(f"a {COLOURS[i % 4]} circle on a white background,{i % 3}\n" for i in range(count))
    (folder / "prompts.csv").write_text("prompt,kind\n" + rows)


def sums(store: Store) -> dict[str, str]:
    """Key → sha256 of every picture and metadata object."""
    keys = [entry.key for prefix in ("data/", "metadata/") for entry in store.list(prefix)]
    return {key: hashlib.sha256(store.get(key)).hexdigest() for key in keys}


def generators(driver: int) -> list[psutil.Process]:
    """The actor processes of a driver that runs Ray on this machine."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        try:
            if "ray::Generator" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_for_commits(process: subprocess.Popen[str], store: Store, count: int) -> None:
    deadline = time.monotonic() + 120
    while len(list(store.list("_sdbatch/commits/"))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no commits came"
        time.sleep(0.05)


def kill_everything(process: subprocess.Popen[str]) -> None:
    """Driver, raylet and actors, all at once, with SIGKILL."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        with_no_mercy(member)
    process.communicate()
    psutil.wait_procs(family, timeout=10)


def with_no_mercy(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()


LONG: dict[str, Any] = {
    "generate": {"num_inference_steps": 8, "seed": 7},
    "output": {"shard_size": 4},
    "resources": {"actors": 2, "batch_size": 2},
}


def test_a_job_from_table_to_report(shell: Shell, sdbatch: CommandLine, write_job: Write, tmp_path: Path) -> None:
    write_prompts(tmp_path, 20)
    job = write_job(input={"keep": ["kind"]}, generate={"negative_prompt": "blur"}, resources={"actors": 2})
    assert sdbatch.json("validate", job)["ok"]
    planned = sdbatch.json("plan", job)
    assert (planned["planned"], planned["shards"], planned["batches"], planned["padding"]) == (20, 3, 5, 0)
    assert sdbatch.json("status", "out") == {
        "name": "test",
        "output": str(tmp_path / "out"),
        "state": "planned",
        "planned": 20,
        "committed": 0,
        "quarantined": 0,
        "shards": 3,
        "shards_committed": 0,
        "bytes": 0,
        "model_seconds": 0.0,
        "dropped": 0,
        "remaining": 20,
        "images_per_second": 0.0,
        "seconds_left": None,
        "reasons": {},
        "driver": None,
    }
    told = shell("run", job).stderr
    assert "test is complete: 20 of 20 images" in told
    assert sdbatch.json("status", "out")["state"] == "complete"
    assert sdbatch.json("verify", "out")["ok"]
    assert sdbatch.json("errors", "out") == []

    rows = pq.read_table(tmp_path / "out/metadata").to_pylist()
    assert [row["image_id"] for row in rows] == [f"{i:08d}-0" for i in range(20)]
    assert rows[4]["prompt"] == "a red circle on a white background"
    assert rows[4]["kind"] == "1"
    assert rows[4]["seed"] == image_seed(7, "00000004", 0)
    picture = Image.open(tmp_path / "out" / rows[4]["path"])
    assert picture.size == (64, 64)

    # The job's picture is the model's own, from the same request in the same place of a batch.
    torch.set_num_threads(1)
    batch = rows[4:8]
    pixels = LatentDiffusion.from_pretrained("builtin:shapes").generate(
        [row["prompt"] for row in batch],
        ["blur"] * 4,
        seeds=[row["seed"] for row in batch],
        num_inference_steps=2,
        guidance_scale=5.0,
        sampler="dpmpp_2m",
    )
    assert np.array_equal(np.asarray(picture), pixels[0])

    told = sdbatch.json("status", "out")
    assert told["images_per_second"] > 0
    assert told["driver"]["state"] == "ended"
    assert {worker["state"] for worker in told["driver"]["now"]["crew"]} <= {"loading", "at work", "waiting"}
    assert "complete" in sdbatch("watch", "out").stderr

    page = sdbatch.json("report", "out")
    assert (page["shown"], page["committed"], page["files"]) == (20, 20, 0)
    summary, shown, thumbnails = read_report(tmp_path / "out/report.html")
    assert [row["image_id"] for row in shown] == [row["image_id"] for row in rows]
    assert (shown[4]["seed"], shown[4]["other kind"]) == (str(rows[4]["seed"]), "1")
    assert all(thumbnails)
    assert sum(summary["timeline"]["images"]) == 20

    for image in (rows[4]["image_id"], "1/7"):  # each in its slot of another batch
        made = sdbatch.json("remake", "out", image, "--to", "again.png")
        (row,) = (row for row in rows if row["image_id"] == made["image_id"])
        assert (tmp_path / "again.png").read_bytes() == (tmp_path / "out" / row["path"]).read_bytes()
        assert made["same"]
    for wrong, said in (("none", "no image none"), ("2/4", "no image 2/4"), ("9/0", "no image 9/0")):
        assert said in sdbatch("remake", "out", wrong, "--to", "again.png", code=2).stderr
    assert "--to: " in sdbatch("remake", "out", "1/7", "--to", "no/again.png", code=2).stderr
    store, key = LocalStore(tmp_path / "out"), "_sdbatch/job.yaml"
    planned = store.get(key)
    store.put(key, planned.replace(b"gpus_per_actor: 0.0", b"gpus_per_actor: 1.0"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: False)
        told = sdbatch("remake", "out", "1/7", "--to", "again.png", code=2).stderr
    assert "1/7 was made on a GPU, and there is none here" in told
    store.put(key, planned)
    again = sdbatch.json("run", job)
    assert (again["state"], again["made_now"]) == ("complete", 0)


def test_every_format_holds_the_same_pictures(sdbatch: CommandLine, write_job: Write, tmp_path: Path) -> None:
    write_prompts(tmp_path, 6)
    shown: dict[str, dict[str, str]] = {}
    for form in ("images", "webdataset", "parquet"):
        sdbatch("run", write_job(output={"uri": str(tmp_path / form), "format": form}))
        assert sdbatch.json("verify", form)["ok"]
        rows = pq.read_table(tmp_path / form / "metadata").to_pylist()
        assert all(row["path"].startswith("data/0000000") for row in rows)
        shown[form] = drawn(open_store(str(tmp_path / form)))
        assert sdbatch.json("report", form)["shown"] == 6
        assert all(read_report(tmp_path / form / "report.html")[2])
    assert len(shown["images"]) == 6
    assert shown["images"] == shown["webdataset"] == shown["parquet"]


def test_faulty_rows_are_quarantined_and_the_rest_is_made(
    sdbatch: CommandLine, write_job: Write, tmp_path: Path
) -> None:
    with (tmp_path / "prompts.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "prompt", "scale"])
        table.writerow(["a", "a red circle", ""])
        table.writerow(["b", "", ""])
        table.writerow(["c", "x" * 10_000, ""])
        table.writerow(["a", "a doubled id", ""])
        table.writerow(["d", "guidance beyond all numbers", "1e38"])
        table.writerow(["../../<b>e[/b]", "a blue ring", ""])
        table.writerow(["f", "a <script>alert(1)</script>", "much"])
    job = write_job(input={"columns": {"id": "id", "guidance_scale": "scale"}})
    told = sdbatch("run", job, code=3).stderr
    assert "test is complete: 2 of 7 images" in told
    status = sdbatch.json("status", "out")
    assert (status["state"], status["planned"], status["committed"], status["quarantined"]) == ("complete", 7, 2, 5)
    assert sdbatch.json("verify", "out")["ok"]
    errors = {failure["image_id"]: failure["error"] for failure in sdbatch.json("errors", "out")}
    assert errors["b-0"] == "row 2: the prompt is empty"
    assert errors["c-0"].startswith("row 3: the prompt has 10000 characters")
    assert errors["row:00000003-0"] == "row 4: the id 'a' is row 1's already"
    assert "not finite" in errors["d-0"]
    assert errors["f-0"].startswith("row 7: guidance_scale is 'much'")
    # An id never becomes a path, and nothing of a user's becomes HTML.
    keys = [entry.key for entry in open_store(str(tmp_path / "out")).list("data/")]
    names = ["00000-a-0.png", "00002-_______b_e__b_-0.png", "metadata.parquet"]
    assert keys == [f"data/0000000/{name}" for name in names]
    assert status["reasons"] == {
        "the prompt is empty": 1,
        "the prompt has N characters; prompt.max_characters allows N": 1,
        "the id '…' is row N's already": 1,
        "the picture is not finite (NaN or infinity)": 1,
        "guidance_scale is '…'; should be a number, N or more": 1,
    }
    assert "the id '…' is row N's already" in sdbatch("status", "out").stderr
    assert "7 of 7, 5 quarantined" in sdbatch("watch", "out", code=3).stderr
    sdbatch("report", "out")
    summary, rows, _ = read_report(tmp_path / "out/report.html")
    assert {row["image_id"] for row in rows} == {*errors, "a-0", "../../<b>e[/b]-0"}
    assert dict(summary["reasons"]) == status["reasons"]
    assert "the prompt is empty" in sdbatch("errors", "out").stderr
    open_store(str(tmp_path / "out")).delete(keys[1])
    assert "1 missing: ../../<b>e[/b]-0" in sdbatch("verify", "out", code=1).stderr
    # Once more: complete, and still told apart from a job without faults.
    sdbatch("run", job, code=3)


def test_rows_choose_their_own_size_steps_and_seed(sdbatch: CommandLine, write_job: Write, tmp_path: Path) -> None:
    (tmp_path / "prompts.csv").write_text("prompt,s,w,h,n\na,5,64,64,2\nb,6,96,64,2\nc,7,64,64,3\nd,8,64,64,2\n")
    columns = {"seed": "s", "width": "w", "height": "h", "num_inference_steps": "n"}
    sdbatch("run", write_job(input={"columns": columns}, generate={"num_images_per_prompt": 2}))
    rows = pq.read_table(tmp_path / "out/metadata").to_pylist()
    assert {row["image_id"]: row["seed"] for row in rows if row["prompt"] == "a"} == {"00000000-0": 5, "00000000-1": 6}
    wide = next(row for row in rows if row["prompt"] == "b")
    assert Image.open(tmp_path / "out" / wide["path"]).size == (96, 64)
    assert [row["shard"] for row in rows] == [0, 0, 0, 0, 1, 1, 2, 2]  # one shape a shard


def test_what_changed_is_refused_with_the_difference(sdbatch: CommandLine, write_job: Write, tmp_path: Path) -> None:
    write_prompts(tmp_path, 4)
    job = write_job()
    sdbatch("plan", job)
    told = sdbatch("run", job, "--set", "generate.seed=8", "--set", "resources.batch_size=2", code=2).stderr
    assert "generate.seed: 7 → 8" in told
    assert "resources.batch_size: 4 → 2" in told
    write_prompts(tmp_path, 5)
    assert "input: prompts.csv changed" in sdbatch("run", job, code=2).stderr
    write_prompts(tmp_path, 4)
    (tmp_path / "prompts.csv").rename(tmp_path / "moved.csv")
    moved = sdbatch.json("run", job, "--set", f"input.uri={tmp_path}/moved.csv", "--set", "resources.actors=2")
    assert moved["state"] == "complete"


def test_odd_sizes_are_one_error_before_anything_starts(sdbatch: CommandLine, write_job: Write, tmp_path: Path) -> None:
    rows = "".join(f"p,{640 + i % 2},480\n" for i in range(100))
    (tmp_path / "prompts.csv").write_text("prompt,w,h\n" + rows)
    job = write_job(input={"columns": {"width": "w", "height": "h"}})
    told = sdbatch("run", job, code=2).stderr
    assert "50 of 100 rows have a width or height that is no multiple of 8 (row 2: 641x480, row 4: 641x480" in told
    assert "set generate.round_size to nearest, down or up" in told
    assert not (tmp_path / "out/_sdbatch/job.yaml").exists()
    planned = sdbatch.json("plan", job, "--set", "generate.round_size=nearest")
    assert planned["sizes"] == {"640x480": 100}


def test_mistakes_end_with_2_and_say_what_to_do(sdbatch: CommandLine, write_job: Write, tmp_path: Path) -> None:
    write_prompts(tmp_path, 2)
    (tmp_path / "file").write_text("")
    for section, told in (
        ({"output": {"uri": str(tmp_path / "file/out")}}, "output.uri:"),
        ({"model": {"uri": str(tmp_path)}}, "has no model_index.json"),
        ({"input": {"columns": {"prompt": "text"}}}, "has no column 'text'; it has: 'prompt', 'kind'"),
        ({"input": {"uri": str(tmp_path / "none.csv")}}, "names no table"),
        ({"generate": {"num_steps": 3}}, "generate.num_steps: no such field"),
        ({"resources": {"gpus_per_actor": 4}}, "lower resources.gpus_per_actor"),
    ):
        job = write_job(**section)
        assert told in sdbatch("run", job, code=2).stderr
    found = sdbatch.json("validate", write_job(generate={"sampler": "dim", "sed": 1}), code=2)
    assert [problem["field"] for problem in found["problems"]] == ["generate.sampler", "generate.sed"]
    assert "error" in sdbatch("status", "nowhere", code=2).stderr
    assert "Did you mean 'status'" in sdbatch("statos", "out", code=2).stderr


def test_a_job_struck_again_and_again_ends_as_if_nothing_had_happened(
    shell: Shell, sdbatch: CommandLine, write_job: Write, tmp_path: Path
) -> None:
    """A second driver, death of all processes at once, Ctrl-C. One process after the other, and on S3, under fire, in
    tests/chaos; SIGTERM while it plans in tests/storage."""
    write_prompts(tmp_path, 48)
    sdbatch("run", write_job(**{**LONG, "output": {"uri": str(tmp_path / "peace"), "shard_size": 4}}))
    job, store = write_job(**LONG), open_store(str(tmp_path / "out"))
    process = shell.start("run", job)
    wait_for_commits(process, store, 1)
    assert f"is in use by the driver {process.pid}" in sdbatch("run", job, code=2).stderr
    assert process.poll() is None
    kill_everything(process)

    process = shell.start("run", job)  # a dead driver of this machine holds nobody up
    wait_for_commits(process, store, len(list(store.list("_sdbatch/commits/"))) + 1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on from here" in err
    assert "Traceback" not in err
    done = sdbatch.json("status", "out")
    assert done["state"] == "incomplete"
    assert sdbatch.json("verify", "out", code=1)["altered"] == []

    rest = sdbatch.json("run", job)
    assert rest["made_now"] <= 48 - done["committed"]
    verdict = sdbatch.json("verify", "out")
    assert (verdict["ok"], verdict["extra"], verdict["committed"]) == (True, [], 48)
    assert sums(store) == sums(open_store(str(tmp_path / "peace")))


def test_too_many_failures_stop_the_job(sdbatch: CommandLine, write_job: Write, tmp_path: Path) -> None:
    (tmp_path / "prompts.csv").write_text("prompt\n" + "a ring\n" * 24)
    job = write_job(generate={"guidance_scale": 1e38})
    told = sdbatch("run", job, code=1).stderr
    assert "images failed while being made, more than failures.max_failed_fraction (0.01) allows" in told


def test_a_table_of_which_nothing_can_be_made_is_refused(
    sdbatch: CommandLine, write_job: Write, tmp_path: Path
) -> None:
    (tmp_path / "prompts.csv").write_text('prompt,n\n"",1\n" ",2\n')
    told = sdbatch("run", write_job(), code=2).stderr
    assert "of 2 images none can be made; row 1: the prompt is empty" in told


def test_a_cluster_too_small_for_the_whole_pool_still_finishes(
    shell: Shell, write_job: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else's Ray, room for one of two actors, a relative output."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}"]
    options = ["--num-cpus=1", "--include-dashboard=false", "--disable-usage-stats"]
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else it depends on whether this user has a token already
    head = subprocess.Popen([*command, *options], start_new_session=True, stdout=subprocess.PIPE, cwd="/")
    try:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        write_prompts(tmp_path, 12)
        made = shell.json("run", write_job(output={"uri": "relative/out"}, resources={"actors": 2}))
        assert (made["state"], made["committed"]) == ("complete", 12)
        assert shell.json("verify", "relative/out")["ok"]
        assert head.poll() is None
    finally:
        kill_everything(head)


def test_a_missing_bucket_is_named_before_anything_starts(
    sdbatch: CommandLine, write_job: Write, tmp_path: Path, s3_server: str
) -> None:
    write_prompts(tmp_path, 2)
    told = sdbatch("run", write_job(output={"uri": "s3://no-such-bucket/x"}), code=2).stderr
    assert "there is no bucket 'no-such-bucket'; create it first" in told


def test_the_same_plan_whatever_the_pool(sdbatch: CommandLine, write_job: Write, tmp_path: Path) -> None:
    write_prompts(tmp_path, 30)
    for actors in (1, 3):
        sdbatch("plan", write_job(output={"uri": str(tmp_path / f"out{actors}")}, resources={"actors": actors}))
    one, three = (open_store(str(tmp_path / f"out{actors}")) for actors in (1, 3))
    keys = [entry.key for entry in one.list("_sdbatch/plan/")]
    assert len(keys) == 3  # requests, slices, shards
    assert [one.get(key) for key in keys] == [three.get(key) for key in keys]
