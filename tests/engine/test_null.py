"""Jobs on ``builtin:null``, the model without a network: everything but the model, and nothing that the model needs."""

from __future__ import annotations

import csv
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdbatch.engine.models.loading import find_model
from sdbatch.engine.models.null import NullModel
from sdbatch.outputs import decode_metadata
from sdbatch.prompts import ImageRequest
from sdbatch.spec import Model
from sdbatch.storage import open_store
from tests.conftest import CommandLine
from tests.drawn import drawn

Write = Callable[..., Path]

MODEL = {"uri": "builtin:null"}
DEFAULTS = {"num_inference_steps": 20, "guidance_scale": 5.0, "sampler": "ddim"}


@pytest.fixture
def prompts(tmp_path: Path) -> None:
    """21 rows: three shards of 8 at most, the last batch of which is not full."""
    with (tmp_path / "prompts.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerows([["prompt"], *([f"a red circle {i} " * 30] for i in range(21))])


def metadata(output: Path) -> list[dict[str, Any]]:
    store = open_store(str(output))
    return [row for entry in store.list("metadata/") for row in decode_metadata(store.get(entry.key))]


def request(seed: int, width: int = 16, height: int = 16, **others: Any) -> ImageRequest:
    return ImageRequest("a-0", "a", "a red circle", "", seed, width, height, **{**DEFAULTS, **others})


@pytest.mark.parametrize("form", ["images", "webdataset", "parquet"])
def test_a_whole_job_is_made_and_verified(
    form: str, sdbatch: CommandLine, write_job: Write, tmp_path: Path, prompts: None
) -> None:
    job = write_job(model=MODEL, output={"format": form})
    ended = sdbatch.json("run", job)
    assert (ended["state"], ended["committed"], ended["quarantined"]) == ("complete", 21, 0)
    assert sdbatch.json("verify", "out")["ok"]
    rows = metadata(tmp_path / "out")
    assert len({row["sha256"] for row in rows}) == 21
    assert {(row["width"], row["height"], row["truncated"]) for row in rows} == {(16, 16, False)}
    assert sdbatch.json("run", job)["made_now"] == 0


def test_the_pixels_are_the_same_whatever_batch_and_actor(
    sdbatch: CommandLine, write_job: Write, tmp_path: Path, prompts: None
) -> None:
    shown = []
    for size, actors in ((4, 1), (5, 2)):
        output = tmp_path / f"{size}-{actors}"
        resources = {"batch_size": size, "actors": actors}
        sdbatch("run", write_job(model=MODEL, output={"uri": str(output)}, resources=resources))
        shown.append(drawn(open_store(str(output))))
    assert len(shown[0]) == 21
    assert shown[0] == shown[1]


def test_what_was_taken_away_is_made_again(
    sdbatch: CommandLine, write_job: Write, tmp_path: Path, prompts: None
) -> None:
    job = write_job(model=MODEL, output={"format": "webdataset"})
    sdbatch("run", job)
    before = {row["image_id"]: row["sha256"] for row in metadata(tmp_path / "out")}
    store = open_store(str(tmp_path / "out"))
    for key in [entry.key for entry in store.list("") if "0000001" in entry.key]:
        store.delete(key)  # all of the second shard
    assert sdbatch.json("repair", "out")["made_now"] == 8
    assert {row["image_id"]: row["sha256"] for row in metadata(tmp_path / "out")} == before
    assert sdbatch.json("verify", "out")["ok"]


def test_a_picture_depends_on_seed_and_size_alone() -> None:
    model = NullModel()
    one, finite = model.draw([request(1), None, request(2)], None, None).wait()
    other, _ = model.draw([request(2, sampler="euler"), request(1, guidance_scale=1.0)], None, None).wait()
    assert finite == [True, True, True]
    assert one.shape == (3, 16, 16, 3)
    assert one.dtype == np.uint8
    assert np.array_equal(one[0], other[1])
    assert np.array_equal(one[2], other[0])
    assert not np.array_equal(one[0], one[2])
    wide, _ = model.draw([request(2**63 - 1, 24, 8)], None, None).wait()
    assert wide.shape == (1, 8, 24, 3)


def test_what_planning_needs_of_a_model_is_small_and_can_be_sent() -> None:
    for uri in ("builtin:null", "builtin:shapes"):
        found = find_model(Model(uri=uri))
        sent = pickle.dumps(found)
        assert len(sent) < 100_000
        back = pickle.loads(sent)
        assert (back.sha256, back.facts) == (found.sha256, found.facts)
        texts = ["a red circle", "a blue square " * 40]
        assert back.chunks(texts, emphasis=True) == found.chunks(texts, emphasis=True)


def test_neither_the_driver_nor_a_generator_imports_torch() -> None:
    code = """
import sys
from sdbatch.engine import runner
from sdbatch.engine.making import logbook
from sdbatch.engine.models import loading
from sdbatch.spec import parse_spec
spec = parse_spec({"name": "n", "input": {"uri": "x"}, "output": {"uri": "y"}, "model": {"uri": "builtin:null"}})
assert loading.find_model(spec.model).sha256 == loading.load_model(spec, logbook.Pen()).sha256
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_commands_that_need_a_network_say_that_there_is_none(
    sdbatch: CommandLine, write_job: Write, tmp_path: Path, prompts: None
) -> None:
    assert sdbatch.json("validate", write_job(model=MODEL))["ok"]
    told = "model 'builtin:null' has no network"
    assert told in sdbatch("inspect", "builtin:null", code=2).stderr
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "pictures/a.png")
    (tmp_path / "pictures/a.txt").write_text("a red circle")
    told = "model 'builtin:null' is not built in"
    assert told in sdbatch("finetune", "builtin:null", "pictures", "tuned", code=2).stderr
