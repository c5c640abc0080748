"""A whole job, from a table on the Hub to a data set in another form, its copies mended on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from sdbatch.storage import LocalStore
from tests import hub_server
from tests.conftest import CommandLine
from tests.hub_server import NEW, OLD, Hub
from tests.outputs.test_consumers import loaded, no_cache_of_the_user  # noqa: F401

Write = Callable[..., Path]
REPO = "datasets/studio/prompts"


def test_from_the_hub_to_a_data_set(
    sdbatch: CommandLine, write_job: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {commit: tmp_path / commit for commit in (OLD, NEW)}
    for commit, folder in folders.items():
        folder.mkdir()
        rows = "".join(f"{i},a hen {i} of {commit[0]}\n" for i in range(6))
        (folder / "train.csv").write_text(f"id,text\n{rows}")
    hub = Hub({REPO: {"main": OLD}}, {(REPO, commit): folder for commit, folder in folders.items()})
    output = {
        "shard_size": 4,
        "image": {"type": "webp", "lossless": True},
        "renditions": {"tall": {"aspect": "9:16", "fit": "pad"}},
        "thumbnail": 16,
        "license": "cc0-1.0",
    }
    table = {"uri": f"hf://{REPO}/train.csv", "columns": {"id": "id", "prompt": "text"}}
    job = write_job(model={"uri": "builtin:null"}, input=table, output=output, generate={"width": 32, "height": 24})
    with hub_server.serving(hub):
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        assert sdbatch.json("run", job)["committed"] == 6
        hub.revisions[REPO]["main"] = NEW
        told = sdbatch("run", job, code=2).stderr
        planned = f"hf://{REPO}@{OLD}/train.csv"
        assert f"what was planned is {planned}" in told
        assert sdbatch.json("run", job, "--set", f"input.uri={planned}")["made_now"] == 0

        store = LocalStore(tmp_path / "out")
        card = store.get("README.md").decode()
        assert "license: cc0-1.0" in card
        assert "| `renditions/tall/` | `tall` |" in card
        names = [entry.key for entry in store.list("renditions/tall/0000000/")]
        before = {key.rpartition("/")[2]: store.get(key) for key in names if key.endswith(".webp")}
        store.delete(names[0])
        assert sdbatch.json("verify", "out", code=1)["missing"] == [names[0]]
        assert sdbatch.json("repair", "out")["batches"] == 0
    assert {name: store.get(f"renditions/tall/0000000r2/{name}") for name in before} == before
    assert sdbatch.json("verify", "out")["extra"] == []

    sdbatch("export", "out", "to", "--format", "parquet", "--image", "jpeg", "--where", "seed >= 0")
    assert sdbatch.json("verify", "to")["ok"]
    found = loaded(tmp_path / "to", tmp_path)
    assert sorted(found["prompt"]) == [f"a hen {i} of 0" for i in range(6)]
    assert all(isinstance(one["image"], Image.Image) and one["image"].size == (32, 24) for one in found)
