"""What goes on beside the model: pictures on their way from the device, and the threads that encode and store."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdbatch.diffusion import LatentDiffusion
from sdbatch.diffusion.decoding import Decoder
from sdbatch.diffusion.memory import peak_bytes
from sdbatch.engine.making.finishers import Finishers, threads_needed
from sdbatch.engine.making.logbook import Mark, Pen
from sdbatch.engine.models.image_model import DrawnAtOnce
from sdbatch.engine.models.loading import footprint
from sdbatch.ledger.attempts import UNTRIED
from tests.engine.test_generator import Planned

NULL = {"uri": "builtin:null"}


class Late:
    """Pictures that arrive once somebody says so."""

    there = False

    def __init__(self, drawn: Any, arrival: threading.Event, error: Exception | None = None) -> None:
        self._drawn, self._arrival, self._error = drawn, arrival, error

    def wait(self) -> tuple[np.ndarray, list[bool]]:
        assert self._arrival.wait(20)
        if self._error is not None:
            raise self._error
        return self._drawn.wait()  # type: ignore[no-any-return]


def test_the_model_goes_on_while_pictures_are_on_their_way(tmp_path: Path) -> None:
    at_once = Planned(tmp_path / "at-once", model=NULL)
    at_once.generator().run_shard(at_once.shard)
    planned = Planned(tmp_path / "late", model=NULL)
    generator, arrivals = planned.generator(), [threading.Event() for _ in range(3)]
    draw, drawn = generator.model.draw, []

    def draw_late(*given: Any) -> Any:
        number = len(drawn)
        if number:
            arrivals[number - 1].set()  # a batch arrives when the next one has begun, and not before
        drawn.append(Late(draw(*given), arrivals[number]))
        if number == 2:
            arrivals[2].set()
        return drawn[-1]

    generator.model.draw = draw_late  # type: ignore[method-assign]
    receipt = generator.run_shard(planned.shard)
    assert receipt is not None
    assert (receipt.committed, receipt.batches) == (7, 3)
    assert planned.sums() == at_once.sums()


def test_pictures_that_arrive_not_finite_are_refused(tmp_path: Path) -> None:
    planned, arrival = Planned(tmp_path, model=NULL), threading.Event()
    generator = planned.generator()
    arrival.set()
    pixels = np.zeros((3, 64, 64, 3), np.uint8)
    generator.model.draw = lambda *given: Late(DrawnAtOnce(pixels, [True, False, True]), arrival)  # type: ignore[method-assign,assignment]
    receipt = generator.run_shard(planned.shard)
    assert receipt is not None
    assert (receipt.committed, receipt.quarantined) == (5, 2)


def test_a_device_that_fails_on_the_way_is_held_against_that_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Notes(Pen):
        marks: list[Mark | None] = []  # noqa: RUF012

        def at(self, mark: Mark | None) -> None:
            self.marks.append(mark)

    planned, arrival = Planned(tmp_path, model=NULL), threading.Event()
    generator = planned.generator(Notes())
    generator.model.device_errors = (torch.AcceleratorError,)
    draw = generator.model.draw
    lost = Late(None, arrival, torch.AcceleratorError("illegal address"))
    generator.model.draw = lambda *given: lost if len(Notes.marks) == 2 else draw(*given)  # type: ignore[method-assign]

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    threading.Timer(0.5, arrival.set).start()
    with pytest.raises(SystemExit):
        generator.run_shard(planned.shard)
    assert Notes.marks[:3] == [Mark("0000000", first, alone=False) for first in (0, 3, 6)]
    assert Notes.marks[-1] == Mark("0000000", 3, alone=False), "not the one that the model was at by then"


def test_a_request_alone_waits_for_what_is_still_on_the_device(tmp_path: Path) -> None:
    planned, marks = Planned(tmp_path, model=NULL), list[Mark | None]()

    class Notes(Pen):
        def at(self, mark: Mark | None) -> None:
            marks.append(mark)

    generator = planned.generator(Notes())
    of_another_shard = Future[dict[int, Any]]()
    generator._newest = [of_another_shard]
    twice = UNTRIED.after(0, False, "a crash").after(0, False, "a crash")
    with ThreadPoolExecutor(1) as pool:
        receipt = pool.submit(generator.run_shard, planned.shard, twice)
        time.sleep(0.2)
        assert marks == [], "it might be blamed for the other's end"
        of_another_shard.set_result({})
        assert receipt.result().committed == 7
    assert marks[0] == Mark("0000000", 0, alone=True)


@pytest.mark.parametrize("told", ["CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate", "cuDNN error: x"])
def test_what_a_library_on_the_device_says_is_no_requests_fault(
    told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any, **how: Any) -> None:
        raise RuntimeError(told)

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(LatentDiffusion, "generate", fail)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr("sdbatch.engine.making.batch._GRACE", 0.0)
    planned = Planned(tmp_path)
    with pytest.raises(SystemExit):
        planned.generator().run_shard(planned.shard)


def test_decoding_gives_the_pixels_of_generate() -> None:
    model = LatentDiffusion.from_pretrained("builtin:shapes")
    how: dict[str, Any] = {"seeds": [1, 2], "num_inference_steps": 2}
    drawn = Decoder(model)(model.generate(["a ring", "a red star"], output="latent", **how))
    pixels, finite = drawn.wait()
    assert drawn.there
    assert finite == [True, True]
    assert (pixels == model.generate(["a ring", "a red star"], **how)).all()
    broken = torch.full((1, model.vae.config.latent_channels, 16, 16), torch.nan)
    assert Decoder(model)(broken).wait()[1] == [False]
    model.vae.decode = lambda z, tiled: torch.tensor([1.0, torch.inf])[:, None, None, None].expand(2, 3, 64, 64)  # type: ignore[method-assign]
    assert Decoder(model)(broken).wait()[1] == [True, False], "infinite is not white"


def test_a_gpu_has_to_hold_both_batches(tmp_path: Path) -> None:
    spec = Planned(tmp_path).spec
    on_gpu = spec.model_copy(update={"resources": spec.resources.model_copy(update={"gpus_per_actor": 1.0})})
    model = LatentDiffusion.from_pretrained("builtin:shapes")
    settings: Any = {"dtype": "float32", "batch": 8, "width": 64, "height": 64}
    assert footprint(spec, 64, 64)(8) == peak_bytes(model.checkpoint, **settings).peak
    memory = peak_bytes(model.checkpoint, **settings, on_gpu=True)
    assert footprint(on_gpu, 64, 64)(8) == memory.beside > memory.peak
    assert memory.beside < 2 * memory.peak


@pytest.mark.parametrize(
    ("finishing", "making", "threads"), [(0.1, 1.0, 1), (1.0, 1.0, 2), (3.9, 1.0, 5), (100.0, 0.1, 16), (1.0, 0.0, 2)]
)
def test_threads_follow_from_what_is_measured(finishing: float, making: float, threads: int) -> None:
    assert threads_needed(finishing, making) == threads


def test_there_is_room_for_as_many_batches_as_keep_up() -> None:
    finishers, at_once, most = Finishers(), 0, 0
    lock = threading.Lock()
    assert finishers.room == 4  # nothing was measured yet

    def store(number: int) -> int:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.05)
        with lock:
            at_once -= 1
        return number

    futures = []
    for number in range(40):  # a batch in 10 ms, five times as fast as it is stored
        wait(futures[: -finishers.room])
        futures.append(finishers.submit(0.01, store, number))
        time.sleep(0.01)
    assert [future.result() for future in futures] == list(range(40))
    assert 8 <= finishers.room <= 18
    assert 4 <= most <= 18


def test_what_fails_beside_the_model_is_raised_to_whoever_asks() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    finishers = Finishers()
    failed = finishers.submit(1.0, fail)
    with pytest.raises(ZeroDivisionError):
        failed.result()
    assert finishers.submit(1.0, lambda: 7).result() == 7
