"""A generator by itself, with the built-in model and without Ray: what it redoes, and what it blames on whom."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sdbatch.diffusion.float8 import Float8Linear
from sdbatch.engine.making.batch import Coming, Refused
from sdbatch.engine.making.generator import Generator
from sdbatch.engine.making.logbook import Pen
from sdbatch.engine.models.loading import find_job_checks, find_model
from sdbatch.engine.planning.slices import shards_of
from sdbatch.errors import ModelError
from sdbatch.ledger import Job, Part, Shard, Shards, verify, write_job, write_slice
from sdbatch.outputs import EncodedPicture, decode_metadata, opens, read_stored
from sdbatch.prompts import ImageRequest, ModelFacts, RowIds, cut, requests_of_slice, to_table
from sdbatch.spec import Picture, parse_spec
from sdbatch.storage import LocalStore
from tests.drawn import drawn


class Planned:
    """Seven prompts in one shard: two batches of three and one padded batch of one."""

    def __init__(
        self,
        root: Path,
        form: str = "images",
        model: Any = None,
        sections: Mapping[str, Any] = {},
        output: Mapping[str, Any] = {},
        **generate: Any,
    ) -> None:
        self.spec = parse_spec(
            {
                "name": "t",
                "input": {"uri": "x.csv"},
                "model": model or {},
                "generate": {"num_inference_steps": 2, **generate},
                "output": {"uri": str(root), "format": form, "shard_size": 8, **output},
                "resources": {"batch_size": 3},
                **sections,
            }
        )
        self.store = LocalStore(root)
        rows: list[dict[str, str | None]] = [{"prompt": f"a red circle {i}"} for i in range(7)]
        self.requests = list(requests_of_slice(rows, 0, self.spec, ModelFacts((64, 64)), RowIds(False)))
        runs = cut(self.requests, 8)
        (self.shard,) = shards_of(runs)
        sha256 = find_model(self.spec.model).sha256
        part = Part("f" * 64, rows=7, slices=1, shards=1, planned=7, faulty=0)
        decides = self.spec.deciding() | {"check_models": find_job_checks(self.spec).sha256}
        job = Job(self.spec.model_dump(mode="json"), decides, [], sha256, {}, (part,))
        write_slice(self.store, job.fingerprint, 0, to_table(self.requests, []))
        self.job = write_job(self.store, job, Shards.of([self.shard]))

    def generator(self, pen: Pen | None = None) -> Generator:
        generator = Generator(self.spec.model_dump(mode="json"), self.job)
        generator._pen = pen or generator._pen
        generator.load()
        return generator

    def sums(self) -> list[str]:
        return [row["sha256"] for row in decode_metadata(self.store.get("metadata/0000000.parquet"))]


def placed(requests: Sequence[ImageRequest]) -> dict[int, ImageRequest]:
    return dict(enumerate(requests))


@pytest.fixture(scope="module")
def peaceful(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    planned = Planned(tmp_path_factory.mktemp("peaceful"))
    receipt = planned.generator().run_shard(planned.shard)
    assert (receipt.committed, receipt.batches) == (7, 3)
    return planned.sums()


def test_float8_reaches_the_model_and_pictures_still_have_no_neighbours(tmp_path: Path) -> None:
    planned = Planned(tmp_path, model={"fp8": True})
    assert planned.spec.deciding()["model"]["fp8"]
    assert not {"fp8", "compile"} & set(Planned(tmp_path / "plain").spec.deciding()["model"])
    generator = planned.generator()
    float8 = [layer for layer in generator.model._model.unet.modules() if isinstance(layer, Float8Linear)]  # type: ignore[attr-defined]
    assert len(float8) > 20
    together, alone = (generator.made_again(planned.shard, at, {}) for at in ([0, 1, 2], [1]))
    assert together[1] == alone[1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eta", 0.9),
        ("guidance_rescale", 0.9),
        ("guidance_interval", [0.5, 1.0]),
        ("clip_skip", 1),
        ("emphasis", True),
        ("sampler", "unipc_karras"),
    ],
)
def test_every_setting_of_generation_reaches_the_model(name: str, value: Any, tmp_path: Path) -> None:
    base = {"sampler": "ddim", "negative_prompt": "a (blue) ring"}
    one, other = Planned(tmp_path / "one", **base), Planned(tmp_path / "other", **{**base, name: value})
    for planned in (one, other):
        planned.generator().run_shard(planned.shard)
    assert not set(drawn(one.store).values()) & set(drawn(other.store).values())


def test_an_actor_that_finds_another_model_than_was_planned_with_refuses(tmp_path: Path) -> None:
    planned = Planned(tmp_path)
    planned.job = dataclasses.replace(planned.job, model_sha256="f" * 64)
    with pytest.raises(ModelError, match=r"is another one on .* than the job was planned with"):
        planned.generator()


def test_a_broken_device_is_no_requests_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Planned(tmp_path).generator()
    failures = iter([RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED"), torch.AcceleratorError("illegal address")])

    def fail(slots: Sequence[Any]) -> Any:
        raise next(failures)

    def leave(code: int) -> None:
        raise Killed

    monkeypatch.setattr(generator._maker, "compute", fail)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(Killed):
        generator._maker.make(0, placed(Planned(tmp_path / "b").requests[:3]))


class Killed(BaseException):
    """Ends the generator where a SIGKILL might have."""


def test_what_copies_come_to_is_measured_by_a_calibration_as_by_a_run(tmp_path: Path) -> None:
    asked = {"renditions": {"square": {"size": "32x32"}}, "thumbnail": 16}
    planned = Planned(tmp_path, model={"uri": "builtin:null"}, output=asked)
    generator = planned.generator()
    calibrated = generator.measure(planned.shard, 2)  # three batches: the shard once
    assert not (tmp_path / "data").exists()
    measured = generator.run_shard(planned.shard).measured  # type: ignore[union-attr]
    folders = [tmp_path / name for name in ("data", "renditions/square", "thumbnails")]
    stored = [path.stat().st_size for folder in folders for path in folder.rglob("*-*.*")]
    assert len(stored) == 3 * 7
    assert (calibrated.images, calibrated.bytes) == (measured.images, measured.bytes) == (7, sum(stored))


def test_a_calibration_waits_for_what_a_gpu_has_not_drawn_yet(tmp_path: Path) -> None:
    planned = Planned(tmp_path, model={"uri": "builtin:null"})
    generator = planned.generator()
    make, takes, through = generator._maker.make, 0.1, [0.0]  # when the device is through with a batch

    def until(due: float, result: Any) -> Any:
        time.sleep(max(due - time.perf_counter(), 0))
        return result

    def begin(first: int, batch: Mapping[int, ImageRequest], *others: Any) -> Any:
        """As on a GPU: what is told to it comes later, and who draws is one batch ahead, but for the first."""
        made, before, warm = make(first, batch, *others), through[-1], len(through) > 1
        through.append(max(before, time.perf_counter()) + takes)
        until(before if warm else through[-1], None)
        return {at: Coming(partial(until, through[-1], result)) for at, result in made.items()}

    generator._maker.make = begin  # type: ignore[method-assign]
    measured = generator.measure(planned.shard, 2)
    assert (measured.batches, measured.firsts) == (2, 1)
    assert measured.seconds >= 2 * takes


@pytest.mark.parametrize("form", ["images", "webdataset", "parquet"])
def test_finished_batches_of_a_dead_writer_are_used(form: str, tmp_path: Path, peaceful: list[str]) -> None:
    planned = Planned(tmp_path, form)
    dying = planned.generator()
    make, submit = dying._maker.make, dying._finishers.submit
    calls, finishing = list[Any](), list[Any]()

    def submit_noted(*given: Any) -> Any:
        finishing.append(submit(*given))
        return finishing[-1]

    def die_in_the_second_batch(first: int, batch: Mapping[int, ImageRequest], *others: Any) -> Any:
        calls.append(batch)
        if len(calls) == 2:
            for stored in finishing:
                stored.result()
            raise Killed
        return make(first, batch, *others)

    dying._maker.make = die_in_the_second_batch  # type: ignore[method-assign]
    dying._finishers.submit = submit_noted  # type: ignore[method-assign]
    with pytest.raises(Killed):
        dying.run_shard(planned.shard)

    receipt = planned.generator().run_shard(planned.shard)
    assert (receipt.committed, receipt.batches) == (7, 2)
    assert planned.sums() == peaceful
    assert verify(planned.store, read_stored, opens, lambda done, total: None).ok
    assert list(planned.store.list("_sdbatch/batches/")) == []


def test_a_request_that_fails_alone_is_refused_and_its_neighbours_keep_their_bytes(
    tmp_path: Path, peaceful: list[str]
) -> None:
    planned = Planned(tmp_path)
    generator = planned.generator()
    compute = generator._maker.compute

    def fail_on_request_1(slots: Sequence[Any]) -> Any:
        if any(slot is not None and slot.request.prompt.endswith(" 1") for slot in slots):
            raise RuntimeError("this request and no other")
        return compute(slots)

    generator._maker.compute = fail_on_request_1  # type: ignore[method-assign]
    receipt = generator.run_shard(planned.shard)
    assert (receipt.committed, receipt.quarantined, receipt.failed_making) == (6, 1, 1)
    rows = decode_metadata(planned.store.get("metadata/0000000.parquet"))
    assert rows[1]["error"] == "RuntimeError: this request and no other"
    assert [row["sha256"] for row in rows[:1] + rows[2:]] == peaceful[:1] + peaceful[2:]


def test_a_picture_that_is_not_finite_is_refused_and_no_other(tmp_path: Path) -> None:
    planned = Planned(tmp_path)
    generator = planned.generator()
    batch = [planned.requests[0], dataclasses.replace(planned.requests[1], guidance_scale=1e38), planned.requests[2]]
    results = generator._maker.make(0, placed(batch))
    assert [isinstance(result, Refused) for result in results.values()] == [False, True, False]
    assert (results[0].pixels == generator._maker.make(0, placed(planned.requests[:3]))[0].pixels).all()


def test_a_cut_prompt_is_recorded(tmp_path: Path) -> None:
    planned = Planned(tmp_path)
    generator = planned.generator()
    long = dataclasses.replace(planned.requests[0], prompt="a red circle " * 40)
    ended = generator._finish(planned.shard, {0: long}, generator._maker.make(0, {0: long}), True, 0.0)
    assert ended[0].row["truncated"] is True
    assert isinstance(ended[0].picture, EncodedPicture)


def test_a_picture_that_its_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    planned = Planned(tmp_path)
    generator = planned.generator()
    generator.spec = generator.spec.model_copy(
        update={"output": generator.spec.output.model_copy(update={"image": Picture(type="jpeg")})}
    )
    wordy = dataclasses.replace(planned.requests[0], negative_prompt="x" * 40_000)
    ended = generator._finish(planned.shard, {0: wordy}, generator._maker.make(0, {0: wordy}), True, 0.0)
    assert ended[0].picture is None
    assert "can't be encoded as jpeg" in ended[0].row["error"]


def test_a_committed_shard_is_not_made_again(tmp_path: Path) -> None:
    planned = Planned(tmp_path)
    first = planned.generator().run_shard(planned.shard)
    again = planned.generator().run_shard(planned.shard)
    assert (first.batches, again.batches) == (3, 0)
    assert again.committed == 7


def test_a_shard_is_described_by_its_place_and_shape(tmp_path: Path) -> None:
    assert Planned(tmp_path).shard == Shard(0, 0, 0, 7, True, 64, 64, 2, "dpmpp_2m", True, 1, None, False)
