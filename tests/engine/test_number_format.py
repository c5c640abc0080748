"""Number formats: what auto decides and stays decided, and that a change of the processor is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sdbatch.bench.clock import psnr
from sdbatch.cli.bills import bill_content, bill_lines
from sdbatch.diffusion import LatentDiffusion
from sdbatch.diffusion.processor import best_dtype, computes_bfloat16, processor
from sdbatch.engine.account import Account, Bill
from sdbatch.engine.making.pool import Pool
from sdbatch.engine.mending import retry
from sdbatch.engine.planning.number_format import with_format
from sdbatch.engine.planning.planner import find_plan, make_plan, prepare
from sdbatch.errors import PlanChanged, SpecError, UsageError
from sdbatch.ledger import Run, begin_run, put_run
from sdbatch.spec import JobSpec, load_spec, parse_spec
from sdbatch.storage import open_store
from tests.engine.test_run import write_prompts

Write = Callable[..., Path]


def spec_with(dtype: str, gpus: int = 0, uri: str = "builtin:shapes") -> JobSpec:
    return parse_spec(
        {
            "name": "t",
            "input": {"uri": "x.csv"},
            "model": {"uri": uri, "dtype": dtype},
            "output": {"uri": "out"},
            "resources": {"gpus_per_actor": gpus},
        }
    )


def test_auto_is_what_the_machine_has_units_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert with_format(spec_with("auto"), None).model.dtype == ("bfloat16" if computes_bfloat16() else "float32")
    monkeypatch.setattr("sdbatch.diffusion.processor.computes_bfloat16", lambda: False)
    assert with_format(spec_with("auto"), None).model.dtype == "float32"
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (7, 5))
    assert best_dtype("cuda") == "float16"
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    assert best_dtype("cuda") == "bfloat16"
    assert with_format(spec_with("auto", uri="builtin:null"), None).model.dtype == "float32"
    spec = spec_with("float16")
    assert with_format(spec, None) is spec


def test_auto_needs_to_see_the_gpu_that_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match=r"model\.dtype: is auto, but no GPU"):
        with_format(spec_with("auto", gpus=1), None)


def test_left_out_it_is_what_every_gpu_is_fast_in() -> None:
    sections: Any = {"name": "t", "input": {"uri": "x.csv"}, "output": {"uri": "out"}}
    for gpus, dtype in ((0, "float32"), (1, "float16"), (0.5, "float16")):
        spec = parse_spec({**sections, "resources": {"gpus_per_actor": gpus}})
        assert with_format(spec, None).model.dtype == dtype
        assert with_format(parse_spec({**sections, "model": {"uri": "builtin:shapes"}}), None).model.dtype == "float32"
    written = parse_spec({**sections, "resources": {"gpus_per_actor": 1}, "model": {"dtype": "float32"}})
    assert with_format(written, None).model.dtype == "float32"


@pytest.mark.usefixtures("ray_here")
def test_the_format_is_in_the_plan_and_stays(write_job: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_prompts(tmp_path, 3)
    spec = load_spec(write_job(model={"dtype": "auto"}))
    monkeypatch.setattr("sdbatch.diffusion.processor.computes_bfloat16", lambda: True)
    job = make_plan(prepare(spec), lambda rows: None)
    assert job.spec["model"]["dtype"] == job.deciding["model"]["dtype"] == "bfloat16"
    monkeypatch.setattr("sdbatch.diffusion.processor.computes_bfloat16", lambda: False)
    again = prepare(spec)
    assert again.spec.model.dtype == "bfloat16", "whatever the machine that goes on computes fast in"
    assert find_plan(again) is not None
    with pytest.raises(PlanChanged, match='"bfloat16" → "float32"'):
        find_plan(prepare(load_spec(tmp_path / "job.yaml", ["model.dtype=float32"])))
    with pytest.raises(SpecError, match=r"model\.dtype=auto: is decided with the plan"):
        retry(again.store, ["model.dtype=auto"], lambda now: None)


def test_bfloat16_shows_the_same_pictures() -> None:
    prompts = ["a red circle on a white background", "a large blue star above a small green ring"]
    drawn: list[Any] = [
        LatentDiffusion.from_pretrained("builtin:shapes", dtype=dtype).generate(
            prompts, seeds=[1, 2], num_inference_steps=4, sampler="dpmpp_2m"
        )
        for dtype in ("float32", "bfloat16")
    ]
    apart = psnr(*drawn)
    assert apart is not None
    assert apart > 40


def test_a_processor_is_told_with_its_units() -> None:
    assert torch.backends.cpu.get_cpu_capability() in processor()
    assert ("bfloat16" in processor()) == computes_bfloat16()


@pytest.mark.usefixtures("ray_here")
def test_a_resume_on_another_device_is_told(write_job: Write, tmp_path: Path) -> None:
    write_prompts(tmp_path, 3)
    prepared = prepare(load_spec(write_job()))
    job, store = make_plan(prepared, lambda rows: None), open_store(str(tmp_path / "out"))
    put_run(store, replace(begin_run(store, Run()), images=1, device="a slow one"))
    put_run(store, replace(begin_run(store, Run()), images=0, device="an idle one"))
    account = Account(prepared, job, 0.0, 0.0)
    assert account.bill().devices_before == (), "nothing was made by this one"
    account._run = replace(account._run, images=2, batches=1)

    pool = Pool(prepared.located, job, lambda *seen: None)
    pool.environment = {"device": "a quick one"}
    account.follow(pool)
    bill = account.bill()
    account.close("complete")
    assert (bill.run.device, bill.devices_before) == ("a quick one", ("a slow one",))
    assert bill_content(bill)["devices_before"] == ["a slow one"]
    assert "a slow one" in bill_lines(bill)[-1]
    assert "slow" not in "".join(bill_lines(Bill(bill.run)))
