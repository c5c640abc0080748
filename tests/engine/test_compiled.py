"""Compiled once for all: whose turn it is, what is taken over from whom, and that nothing is compiled twice."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from sdbatch.diffusion import LatentDiffusion, compilation
from sdbatch.diffusion.compilation import lacking, pack, unpack
from sdbatch.diffusion.float8 import lacking as lacking_float8
from sdbatch.engine.making.logbook import Pen
from sdbatch.engine.models.compiled import CompiledCode, code_key, keep_code, known_code
from sdbatch.engine.models.turns import Turns
from sdbatch.engine.planning.planner import prepare
from sdbatch.errors import ModelError, UsageError
from sdbatch.spec import parse_spec
from sdbatch.storage import LocalStore


class Seat(Pen):
    """An actor's place at a desk that all actors share."""

    def __init__(self, turns: Turns, actor: int) -> None:
        super().__init__()
        self.turns, self.actor = turns, actor

    def turn(self, key: str) -> str | None:
        return self.turns.ask(self.actor, key)

    def turn_done(self, key: str, sha256: str) -> None:
        self.turns.done(self.actor, key, sha256)


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Moves to another node: a cache of its own."""

    def move(node: str) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / node))

    move("one")
    return move


def compiles(code: CompiledCode, shape: str) -> bool:
    """Draw in a shape; does this actor compile for it?"""
    compiled = False
    with code.ready(shape):
        kernel = code.folder / "ab" / f"{shape}.so"
        if not kernel.exists():
            compiled = True
            kernel.parent.mkdir(parents=True, exist_ok=True)
            kernel.write_bytes(f"code for {shape}".encode())
    return compiled


def test_one_at_a_time_has_the_turn_and_the_dead_lose_it() -> None:
    turns = Turns({})
    assert turns.ask(1, "a") == ""
    assert turns.ask(2, "a") is None
    assert turns.ask(2, "b") is None, "kernels of two shapes in the making would be packed half written"
    turns.leave(2)
    assert turns.ask(2, "a") is None, "the other one still has it"
    turns.leave(1)
    assert turns.ask(2, "a") == ""
    turns.done(2, "a", "sum")
    assert [turns.ask(1, "a"), turns.ask(1, "b")] == ["sum", ""]
    turns.done(1, "b", "")
    assert (turns.ask(3, "b"), turns.known) == ("", {"a": "sum"})


def test_what_one_compiled_all_others_take_over(tmp_path: Path, caches: Any) -> None:
    store, turns = LocalStore(tmp_path / "out"), Turns({})
    one, beside = (CompiledCode(store, Seat(turns, actor), "k") for actor in (1, 2))
    assert compiles(one, "64")
    assert not compiles(one, "64")
    assert not compiles(beside, "64"), "on the same node it lies in the same folder"
    caches("two")
    other = CompiledCode(store, Seat(turns, 3), "k")
    assert not compiles(other, "64")
    assert compiles(other, "128")
    caches("three")
    next_run = CompiledCode(store, Seat(Turns(turns.known), 1), "k")
    assert not compiles(next_run, "128")
    assert not compiles(next_run, "64")
    caches("four")
    assert compiles(CompiledCode(store, Seat(Turns({}), 1), "k"), "64"), "whose checksum nobody told is not loaded"


def test_a_tar_that_is_gone_or_altered_is_not_loaded(tmp_path: Path, caches: Any) -> None:
    store, turns = LocalStore(tmp_path / "out"), Turns({})
    compiles(CompiledCode(store, Seat(turns, 1), "k"), "64")
    (tar,) = (tmp_path / "out/_sdbatch/compiled/k").iterdir()
    tar.write_bytes(tar.read_bytes().replace(b"code for", b"evil for"))
    caches("two")
    assert compiles(CompiledCode(store, Seat(turns, 2), "k"), "64")
    tar.unlink()
    caches("three")
    assert compiles(CompiledCode(store, Seat(turns, 3), "k"), "64")


def test_who_fails_gives_the_turn_back(tmp_path: Path) -> None:
    turns = Turns({})
    with pytest.raises(ZeroDivisionError), CompiledCode(LocalStore(tmp_path), Seat(turns, 1), "k").ready("64"):
        raise ZeroDivisionError
    assert compiles(CompiledCode(LocalStore(tmp_path), Seat(turns, 2), "k"), "64")
    assert len(turns.known) == 1


def test_a_driver_remembers_what_its_actors_told(caches: Any) -> None:
    assert known_code("s3://a/b") == {}
    keep_code("s3://a/b", {"k/64": "1"})
    keep_code("s3://a/c", {"k/64": "2"})
    keep_code("s3://a/b", {"k/128": "3"})
    assert known_code("s3://a/b") == {"k/64": "1", "k/128": "3"}
    caches("elsewhere")
    assert known_code("s3://a/b") == {}
    assert code_key("a", 1) != code_key("a", 2)


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x"])
def test_a_tar_writes_nowhere_else(name: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(ModelError, match="no file below"):
        unpack(buffer.getvalue(), tmp_path)
    with pytest.raises(ModelError, match="can't be unpacked"):
        unpack(b"no tar", tmp_path)


def test_packed_is_what_was_compiled_and_what_is_there_stays(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for name, text in {"ab/k.so": "code", "ab/k.lock": "", "x.done": "", "y.7.partial": "half"}.items():
        (one / name).parent.mkdir(parents=True, exist_ok=True)
        (one / name).write_text(text)
    unpack(pack(one), other)
    assert [path.relative_to(other).as_posix() for path in other.rglob("*.*")] == ["ab/k.so"]
    (other / "ab/k.so").write_text("its own")
    unpack(pack(one), other)
    assert (other / "ab/k.so").read_text() == "its own"


def test_what_a_machine_lacks_is_told_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw: Any = {"name": "t", "input": {"uri": "x.csv"}, "output": {"uri": str(tmp_path / "out")}}
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UsageError, match="builtin:null has no network"):
        prepare(parse_spec({**raw, "model": {"uri": "builtin:null", "compile": True}}))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ModelError, match=r"model\.compile: needs a C\+\+ compiler, and there is no no-such-compiler"):
        prepare(parse_spec({**raw, "model": {"compile": True}}))
    monkeypatch.setattr("sdbatch.diffusion.float8.Float8Linear.forward", lambda self, x: _no_such_kernel())
    with pytest.raises(ModelError, match=r"model\.fp8: needs float8 products"):
        prepare(parse_spec({**raw, "model": {"fp8": True}}))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 0))
    assert "8.9" in str(lacking_float8("cuda"))
    monkeypatch.setattr(compilation, "find_spec", lambda name: None)
    assert "Triton" in str(lacking("cuda"))
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what the compiler imports
def test_whoever_compiles_blocks_has_kernels_chosen_by_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs and the bench alike; and what else is compiled beside them, as diffusers, may choose as it likes."""
    asked = list[Any]()

    def as_it_is(graph: Any, inputs: Any, config_patches: Any = None, **others: Any) -> Any:
        asked.append(config_patches)
        return graph.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", as_it_is)
    model = LatentDiffusion.from_pretrained("builtin:shapes")
    compilation.compile_blocks(model)
    model.decode(torch.zeros(1, 4, 8, 8))
    assert len(asked) > 2
    assert all(options == {"deterministic": True} for options in asked)
    assert not torch._inductor.config.deterministic


def _no_such_kernel() -> torch.Tensor:
    raise NotImplementedError


_PROCESS = """
import hashlib, json, sys
from pathlib import Path
from torch._dynamo.utils import counters
from sdbatch.diffusion.unet import TransformerBlock
from sdbatch.engine.models import latent_model
from sdbatch.engine.models.turns import Turns
from tests.engine.test_compiled import Seat
from tests.engine.test_generator import Planned

def only_the_middle(model):  # of the network: the whole takes minutes
    for module in model.unet.mid_block.modules():
        if isinstance(module, TransformerBlock):
            module.compile(fullgraph=True, dynamic=False)

latent_model.compile_blocks = only_the_middle
turns = Turns(json.loads(sys.argv[2]))
planned = Planned(Path(sys.argv[1]), model={"compile": True})
generator = planned.generator(Seat(turns, 1))
made = generator.made_again(planned.shard, [0, 4], {})
print(json.dumps({
    "known": turns.known,
    "compiled": counters["inductor"]["fxgraph_cache_miss"],
    "found": counters["inductor"]["fxgraph_cache_hit"],
    "sums": [hashlib.sha256(data).hexdigest() for data in made.values()],
}))
"""


@pytest.mark.skipif(lacking("cpu") is not None, reason=f"torch's compiler {lacking('cpu')}")
def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    compiler = tmp_path / "bin/g++"
    compiler.parent.mkdir()
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nexec {shutil.which("g++")} "$@"\n')
    compiler.chmod(0o700)

    def process(node: str, known: dict[str, str]) -> Any:
        (tmp_path / "calls").write_text("")
        environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / node), "TORCHINDUCTOR_CACHE_DIR": ""}
        environment["PATH"] = f"{compiler.parent}:{os.environ['PATH']}"
        command = [sys.executable, "-c", _PROCESS, str(tmp_path / "out"), json.dumps(known)]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        calls = (tmp_path / "calls").read_text()  # others find out which vector units there are
        return {**json.loads(ended.stdout.splitlines()[-1]), "kernels": calls.count(".main.cpp")}

    first = process("one", {})
    assert (first["compiled"], first["found"]) == (1, 0)
    assert first["kernels"] > 0
    (tmp_path / "one").rename(tmp_path / "gone")
    second = process("two", first["known"])
    assert (second["compiled"], second["found"]) == (0, 1)
    assert second["kernels"] == 0
    assert second["sums"] == first["sums"]
    assert second["known"] == first["known"]
