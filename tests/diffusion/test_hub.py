"""Models from the Hugging Face Hub, which here is a small server on this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sdbatch.diffusion import LatentDiffusion, open_checkpoint
from sdbatch.errors import ModelError
from tests.diffusion import tiny_models
from tests.diffusion.test_clip import save_reference
from tests.diffusion.test_safety_checker import Reference as Safety
from tests.hub_server import NEW, OLD, Hub, serving


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """studio/whole has all that repositories pile up; of studio/half the U-Net is there in half precision only."""
    folder = tmp_path_factory.mktemp("hub")
    pipeline = tiny_models.sdxl()
    whole = tiny_models.save(pipeline, folder / "whole")
    model = LatentDiffusion.from_pretrained(whole)
    model.save_pretrained(folder / "fp16", dtype="float16")
    model.save_single_file(whole / "model.safetensors")
    for path in (folder / "fp16").glob("*/*.safetensors"):
        shutil.copy(path, whole / path.parent.name / f"{path.stem}.fp16.safetensors")
    for name in ("unet/diffusion_pytorch_model.non_ema.safetensors", "vae_1_0/diffusion_pytorch_model.safetensors"):
        (whole / name).parent.mkdir(exist_ok=True)
        shutil.copy(whole / "unet/diffusion_pytorch_model.safetensors", whole / name)
    for name in ("unet/diffusion_pytorch_model.bin", "vae_decoder/model.onnx", "README.md", "safety_checker/a.txt"):
        (whole / name).parent.mkdir(exist_ok=True)
        (whole / name).write_text("not for us")
    old = shutil.copytree(whole, folder / "old")
    scheduler = old / "scheduler/scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace('"epsilon"', '"v_prediction"'))
    half = shutil.copytree(whole, folder / "half")
    (half / "unet/diffusion_pytorch_model.safetensors").unlink()
    (half / "unet/diffusion_pytorch_model.non_ema.safetensors").unlink()
    (folder / "empty").mkdir()
    (folder / "empty/README.md").write_text("nothing")
    hub = Hub(
        {
            "studio/whole": {"main": NEW, "v1": OLD, "refs%2Fpr%2F3": OLD},
            "studio/half": {"main": NEW},
            "studio/empty": {"main": NEW},
        },
        {
            ("studio/whole", NEW): whole,
            ("studio/whole", OLD): old,
            ("studio/half", NEW): half,
            ("studio/empty", NEW): folder / "empty",
        },
    )
    with serving(hub):
        yield hub


CLIENT = """
import json, sys
from sdbatch.diffusion import open_checkpoint
from sdbatch.errors import SdbatchError
for uri in sys.argv[2:]:
    try:
        found = open_checkpoint(uri, tokenizer=sys.argv[1])
        for part in found.components:
            part.skeleton()
        told = {"path": str(found.path), "family": found.family, "predicts": found.schedule.prediction_type,
                "unet": sorted(set(found.unet.weights.dtypes.values()))}
    except SdbatchError as error:
        told = {"error": str(error)}
    print(json.dumps(told))
"""


def online(hub: Hub, cache: Path, **settings: str) -> dict[str, str]:
    """The environment of a process that finds this Hub."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **settings,
    }


def ask(hub: Hub, cache: Path, *uris: str, **settings: str) -> dict[str, dict[str, Any]]:
    """What each model looks like in a new process: the client reads its environment once, when it is imported."""
    tokenizer = hub.folders["studio/whole", NEW] / "tokenizer"
    command = [sys.executable, "-c", CLIENT, str(tokenizer), *uris]
    done = subprocess.run(command, env=online(hub, cache, **settings), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(uris, map(json.loads, done.stdout.splitlines()), strict=True))


@dataclass
class Session:
    """One process online, and the cache that it left."""

    told: dict[str, dict[str, Any]]
    cache: Path


@pytest.fixture(scope="module")
def session(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Session:
    cache = tmp_path_factory.mktemp("cache")
    uris = [
        "hf:studio/whole",
        "hf:studio/whole@v1",
        "hf:studio/whole@refs/pr/3",
        f"hf:studio/whole@{OLD}/model.safetensors",
        "hf:studio/half",
        "hf:studio/whole@v9",
        "hf:studio/whole/none.safetensors",
        "hf:studio/gated",
        "hf:studio/nothing",
        "hf:studio/empty",
        "hf:studio",
        "hf:studio/whole/model.ckpt",
    ]
    return Session(ask(hub, cache, *uris), cache)


def test_a_repository_is_fetched_without_what_is_not_read(hub: Hub, session: Session) -> None:
    told = session.told["hf:studio/whole"]
    assert (told["family"], told["predicts"], told["unet"]) == ("SDXL", "epsilon", ["F32"])
    assert told["path"].endswith(NEW)
    weights = {name for name in hub.fetched("studio/whole") if not name.endswith((".json", ".txt"))}
    assert weights == {
        "text_encoder/model.safetensors",
        "text_encoder_2/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert "safety_checker/a.txt" not in hub.fetched("studio/whole")


def test_half_precision_is_fetched_where_there_is_nothing_else(hub: Hub, session: Session) -> None:
    told = session.told["hf:studio/half"]
    assert (told["family"], told["unet"]) == ("SDXL", ["F16"])
    halves = {name for name in hub.fetched("studio/half") if "fp16" in name}
    assert halves == {"unet/diffusion_pytorch_model.fp16.safetensors"}


@pytest.mark.parametrize("revision", ["v1", "refs/pr/3"])
def test_a_revision_is_what_it_stands_for(revision: str, session: Session) -> None:
    told = session.told[f"hf:studio/whole@{revision}"]
    assert told["predicts"] == "v_prediction"
    assert told["path"].endswith(OLD)


def test_one_file_of_a_repository_at_one_commit(session: Session) -> None:
    told = session.told[f"hf:studio/whole@{OLD}/model.safetensors"]
    assert told["family"] == "SDXL"
    assert told["path"].endswith(f"{OLD}/model.safetensors")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("hf:studio/nothing", "there is no such repository, or it is private"),
        (
            "hf:studio/gated",
            r"its licence must be accepted at https://huggingface\.co/studio/gated and HF_TOKEN be set",
        ),
        ("hf:studio/whole@v9", "the repository has no revision 'v9'"),
        ("hf:studio/whole/none.safetensors", r"has no none\.safetensors in that repository"),
        ("hf:studio/empty", r"has no model_index\.json in that repository"),
        ("hf:studio", "should be hf:OWNER/NAME"),
        ("hf:studio/whole/model.ckpt", "should be hf:OWNER/NAME"),
    ],
)
def test_what_can_not_be_had_is_said_in_words(uri: str, message: str, session: Session) -> None:
    assert re.search(message, session.told[uri]["error"])
    assert f"model '{uri}'" in session.told[uri]["error"]


def test_what_was_fetched_needs_no_network(hub: Hub, session: Session) -> None:
    before = len(hub.asked)
    uris = ["hf:studio/whole", "hf:studio/whole@v1", "hf:studio/half"]
    again = ask(hub, session.cache, *uris, "hf:studio/never", HF_HUB_OFFLINE="1")
    assert [again[uri] for uri in uris] == [session.told[uri] for uri in uris]
    assert "HF_HUB_OFFLINE is set" in again["hf:studio/never"]["error"]
    assert len(hub.asked) == before


def test_without_a_network_what_was_fetched_is_used_and_the_rest_refused(hub: Hub, session: Session) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}"
        told = ask(hub, session.cache, "hf:studio/whole", "hf:studio/never", HF_ENDPOINT=nobody)
    assert told["hf:studio/whole"] == session.told["hf:studio/whole"]
    assert "the Hub can't be reached" in told["hf:studio/never"]["error"]


def test_a_local_model_never_touches_the_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    folder = hub.folders["studio/whole", NEW]
    assert LatentDiffusion.from_pretrained("builtin:shapes").schedule.num_train_timesteps == 1000
    assert LatentDiffusion.from_pretrained(folder).checkpoint.family == "SDXL"
    file = open_checkpoint(str(folder / "model.safetensors"), tokenizer=str(folder / "tokenizer"))
    assert file.family == "SDXL"
    with pytest.raises(ModelError, match="does not exist"):
        open_checkpoint("studio/whole/model.safetensors")


CLIPS = """
import sys
from sdbatch.checks import find_checks
from sdbatch.errors import SdbatchError
from sdbatch.spec import Checks
for name, uri in (word.split("=") for word in sys.argv[1:]):
    try:
        print(find_checks(Checks.model_validate({name: {"model": uri}})).paths[name])
    except SdbatchError as error:
        print(error)
"""


def test_models_of_checks_are_fetched_without_what_is_not_read(tmp_path: Path) -> None:
    clip = save_reference(tmp_path / "clip", "quick_gelu").folder
    whole = Safety(tmp_path / "whole").root
    for folder in (clip, whole):
        (folder / "pytorch_model.bin").write_text("not for us")
    hub = Hub(
        {"studio/clip": {"main": NEW}, "studio/whole": {"main": NEW}},
        {("studio/clip", NEW): clip, ("studio/whole", NEW): whole},
    )
    models = ["clip_score=hf:studio/clip", "safety=hf:studio/whole", f"safety=hf:studio/whole@{NEW}/safety_checker"]
    with serving(hub):
        command = [sys.executable, "-c", CLIPS, *models, "clip_score=hf:studio/whole", "clip_score=hf:studio/clip/a/b"]
        environment = online(hub, tmp_path / "cache")
        told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert told[0].endswith(f"snapshots/{NEW}")
    assert told[1] == told[2]
    assert told[1].endswith(f"snapshots/{NEW}/safety_checker")
    assert "clip_score.model: model 'hf:studio/whole' has no config.json" in told[3]
    assert "should be hf:OWNER/NAME" in told[4]
    assert not any(name.endswith(".bin") for repo in ("studio/clip", "studio/whole") for name in hub.fetched(repo))
    assert "feature_extractor/preprocessor_config.json" in hub.fetched("studio/whole")
