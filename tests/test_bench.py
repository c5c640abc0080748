"""The bench: what it counts, what it keeps, what it says."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sdbatch import cli
from sdbatch.bench.back_to_back import NAME, draws_back_to_back, measure_back_to_back
from sdbatch.bench.clock import Requests, Setting, Timing, draws
from sdbatch.bench.floor import count_flops
from sdbatch.bench.quality import Quality, _prompt, find_scorer, gate
from sdbatch.bench.sizes import checkpoint_of, load_subject
from sdbatch.bench.subject import Subject
from sdbatch.bench.techniques import TECHNIQUES, Technique, as_in_jobs, float8
from sdbatch.bench.waterfall import by_batch, prepared, waterfall
from sdbatch.diffusion.decoding import Decoder, Drawn
from sdbatch.diffusion.float8 import Float8Linear
from sdbatch.errors import JobFailed
from sdbatch.spec import Model

SETTING = Setting(64, 64, 2, 5.0, "euler", "cpu", "float32", 1)


@pytest.mark.parametrize(
    ("model", "side", "unet", "decoder"),
    [("sd15", 512, 0.803, 2.51), ("sd21", 768, 2.149, 5.75), ("sdxl", 1024, 6.761, 10.47)],
)
def test_a_model_of_a_published_size_takes_the_published_arithmetic(
    model: str, side: int, unet: float, decoder: float
) -> None:
    counted = count_flops(checkpoint_of(model), side, side)
    assert counted.unet / 1e12 == pytest.approx(unet, abs=5e-4)
    assert counted.decoder / 1e12 == pytest.approx(decoder, abs=5e-3)
    assert counted.of_picture(40) == counted.text + 40 * counted.unet + counted.decoder


def test_random_weights_are_the_same_every_time_and_pictures_are_finite() -> None:
    checkpoint = checkpoint_of("sd15-quarter")
    pictures = [
        load_subject(checkpoint, "cpu", "float32").generate(
            ["a ring"], seeds=[1], width=64, height=64, num_inference_steps=1, output="latent"
        )
        for _ in range(2)
    ]
    assert torch.equal(*pictures)
    assert pictures[0].isfinite().all()
    assert pictures[0].std() > 0.1


@pytest.mark.parametrize(
    "technique",
    [technique for technique in TECHNIQUES if technique.of != "compiler" and "float8" not in technique.name],
    ids=lambda technique: technique.name,
)
def test_a_technique_changes_speed_and_not_pictures(technique: Technique) -> None:
    checkpoint = checkpoint_of("builtin:shapes")
    if technique.lacking(checkpoint, SETTING):
        pytest.skip("not on this machine")
    plain, faster = prepared(checkpoint, SETTING, ()), prepared(checkpoint, SETTING, (technique,))
    latents = [
        subject.generate(["a ring"], seeds=[1], num_inference_steps=2, output="latent") for subject in (plain, faster)
    ]
    assert torch.allclose(*latents, atol=1e-4)


def test_a_row_that_fails_is_told_and_the_next_has_its_memory() -> None:
    tried: list[weakref.ref[Subject]] = []

    def fails_at_once(subject: Subject) -> None:
        tried.append(weakref.ref(subject))
        raise KeyError("no such kernel")

    def fails_later(subject: Subject) -> None:
        tried.append(weakref.ref(subject))

        def encode(*prompts: object, **how: object) -> None:
            raise NotImplementedError("not for this device\nand more that nobody reads")

        subject.encode = encode  # type: ignore[method-assign, assignment]

    def looks(subject: Subject) -> None:
        assert [one() for one in tried] == [None, None]

    techniques = [Technique("one", fails_at_once), Technique("two", fails_later), Technique("three", looks)]
    rows = [row for row, _ in waterfall(checkpoint_of("builtin:shapes"), SETTING, 1, 1, techniques)]
    assert [row.name for row in rows] == ["eager", "one", "two", "three"]
    assert [row.lacking for row in rows[1:3]] == [
        "KeyError: 'no such kernel'",
        "NotImplementedError: not for this device",
    ]
    assert rows[3].timing is not None, rows[3].lacking
    (small,) = by_batch(checkpoint_of("builtin:shapes"), SETTING, techniques[:1], [1], 1)
    assert small.lacking == "KeyError: 'no such kernel'"


def test_only_what_jobs_can_do_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([4.0, 3.0, 5.0, 2.0, 4.5])
    monkeypatch.setattr("sdbatch.bench.waterfall.measure", lambda *how: Timing(1, 0.0, [next(seconds)]))
    techniques = [
        Technique("no job can", lambda subject: None),
        Technique("jobs always do", lambda subject: None, always=("cpu",)),
        Technique("a field", lambda subject: None, field="model.faster"),
        Technique("another field", lambda subject: None, field="model.slower"),
    ]
    found = list(waterfall(checkpoint_of("builtin:shapes"), SETTING, 1, 1, techniques))
    assert [(row.kept, row.in_jobs) for row, _ in found] == [
        (True, True),
        (False, False),  # the fastest so far, and yet
        (True, True),  # slower, and yet
        (True, True),
        (False, True),
    ]
    assert found[-1][1] == (techniques[1], techniques[2])


def test_what_jobs_do_is_what_a_loaded_model_does() -> None:
    on_cpu, on_gpu = ([technique.name for technique in as_in_jobs(device)] for device in ("cpu", "cuda"))
    assert on_cpu[:-1] == on_gpu[:-1]
    assert (on_cpu[-1], on_gpu[-1]) == ("convolutions packed: U-Net", "channels last: U-Net")
    asked = as_in_jobs("cpu", "model.compile", "model.fp8")
    assert [technique.name for technique in asked[4:]] == ["compiled block by block", "float8 linear layers"]
    fields = {technique.field for technique in TECHNIQUES if technique.field is not None}
    assert (
        fields
        == {f"model.{name}" for name in ("compile", "fp8", "vae_slicing")}
        <= {f"model.{name}" for name in Model.model_fields}
    )


def test_batches_back_to_back_have_the_bytes_of_single_ones() -> None:
    subject = prepared(checkpoint_of("builtin:shapes"), SETTING, as_in_jobs("cpu"))
    batches = [Requests().batch(2), Requests().batch(1)]
    together = draws_back_to_back(subject, SETTING)(batches)
    assert [len(pictures) for pictures in together] == [2, 1]
    alone = [draws(subject, SETTING)(*batch) for batch in batches]
    assert all(np.array_equal(one, other) for one, other in zip(together, alone, strict=True))
    timing, same = measure_back_to_back(subject, SETTING, 1, 2)
    assert same
    assert len(timing.seconds) == 2


def test_other_bytes_back_to_back_are_a_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    decode = Decoder.__call__

    def spoilt(self: Decoder, latents: torch.Tensor) -> Drawn:
        return decode(self, latents + 1)

    monkeypatch.setattr(Decoder, "__call__", spoilt)
    assert cli.call(["bench", "--steps", "1", "--batch", "1", "--runs", "1", "--no-techniques", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (row,) = (row for row in found["rows"] if row["name"] == NAME)
    assert row["same_bytes"] is False
    assert "other bytes" in row["lacking"]
    assert "job" not in found


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each model that was to be compiled block by block, which takes minutes: was it one with float8 layers?"""
    models = list[bool]()

    def note(subject: Subject) -> None:
        models.append(any(isinstance(module, Float8Linear) for module in subject.unet.modules()))

    noted = tuple(replace(one, apply=note) if one.field == "model.compile" else one for one in TECHNIQUES)
    monkeypatch.setattr("sdbatch.bench.techniques.TECHNIQUES", noted)
    monkeypatch.setattr("sdbatch.bench.report.compiler_lacking", lambda device: None)
    return models


def test_the_gate_compiles_as_a_job_would(compiled: list[bool]) -> None:
    gate(checkpoint_of("builtin:shapes"), SETTING, float8, 1, 1, None, "model.compile")
    assert compiled == [False, True], "the plain one, and the one whose layers were changed before, as a job does"


def test_without_techniques_ours_is_compiled_too_where_it_may_be(
    compiled: list[bool], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["bench", "--steps", "1", "--batch", "1", "--runs", "1", "--no-techniques", "--compile", "--json"]
    assert cli.call(options) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fields"] == ["model.compile"]
    assert found["kept"][-1] == "compiled block by block"
    assert len(compiled) == 3, "for the rows of a batch, of batches back to back, and for a batch's parts"


def test_a_linear_layer_in_eight_bits_is_near_the_one_it_was() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 32)
    x = torch.randn(5, 7, 64)
    expected = layer(x)
    rounded = Float8Linear(layer)(x)
    assert rounded.shape == expected.shape
    assert rounded.dtype == x.dtype
    assert 0.001 < (rounded - expected).norm() / expected.norm() < 0.06


def test_the_gate_lets_alike_pictures_pass_and_refuses_others() -> None:
    assert Quality(8, 35.0, 20.0, (0.9, 0.895)).reasons == []
    assert Quality(8, 35.0, 20.0, (0.9, 0.95)).reasons == [], "better is no harm"
    assert "29.0 dB in the median" in Quality(8, 29.0, 20.0).reasons[0]
    (lost,) = Quality(8, 35.0, 20.0, (0.9, 0.88)).reasons
    assert lost.startswith("2.22 % of CLIP's score is lost")
    assert len(Quality(8, math.nan, math.nan, (0.9, math.nan)).reasons) == 2
    with pytest.raises(JobFailed, match=r"fp8 does not pass the gate: 29\.0 dB"):
        Quality(8, 29.0, 20.0).refuse("model.fp8")
    assert len({_prompt(number) for number in range(200)}) == 200


def test_the_gate_measures_what_a_change_does() -> None:
    checkpoint, scorer = checkpoint_of("builtin:shapes"), find_scorer("", "builtin:shapes", "cpu")
    assert find_scorer("", "sdxl", "cpu") is None
    same = gate(checkpoint, SETTING, lambda subject: None, 2, 2, scorer)
    assert (same.pictures, same.psnr, same.drift) == (2, 99.0, 0.0)

    def spoil(subject: Subject) -> None:
        subject.unet.conv_out.weight.zero_()

    spoilt = gate(checkpoint, SETTING, spoil, 2, 2, scorer)
    assert spoilt.reasons


def test_the_command_ends_with_1_where_the_gate_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["bench", "--steps", "2", "--batch", "2", "--runs", "1", "--no-techniques", "--gate", "2"]
    assert cli.call([*options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["gate"]
    assert found["passed"]
    assert found["psnr"] < 99, "it was drawn with other arithmetic"
    monkeypatch.setattr("sdbatch.bench.quality.LEAST_PSNR", 98.0)
    assert cli.call([*options, "--out", str(tmp_path)]) == 1
    assert "does not pass the gate" in " ".join(capsys.readouterr().err.split())
    assert not json.loads((tmp_path / "bench.json").read_text())["gate"]["passed"]


@pytest.mark.filterwarnings("ignore")  # diffusers' own
def test_the_command_measures_ours_and_diffusers_and_writes_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--steps", "1", "--batch", "1", "--runs", "1", "--no-techniques", "--against", "diffusers", "--json"]
    assert cli.call(["bench", *options, "--out", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "bench.json").read_text())
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    row, duel = found["rows"][0], found["duels"][0]
    assert found["job"] == found["rows"][1]
    assert (found["job"]["name"], found["job"]["same_bytes"], found["job"]["kept"]) == (NAME, True, True)
    assert row["images_a_second"] > 0
    assert row["share_of_floor"] == pytest.approx(row["images_a_second"] / found["floor_images_a_second"], rel=0.01)
    assert len(duel["ratios"]) == 5
    assert duel["psnr"] is None or duel["psnr"] > 40, "both made the same pictures"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["no-such-size"], "use sd15, sd21, sdxl"),
        (["--dtype", "int4"], "use one of float32"),
        (["--sampler", "eular"], "use one of ddpm"),
        (["--against", "magic"], "use diffusers"),
        (["--against", "diffusers", "--sampler", "lcm"], "use one of the samplers ddim"),
        (["--device", "cuda"], "there is no CUDA device here"),
    ],
)
def test_what_cannot_be_measured_is_told_at_once(
    options: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.call(["bench", *options]) == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_the_bench_runs_where_there_is_no_ray_and_no_pydantic() -> None:
    absent = "import sys; sys.modules.update(dict.fromkeys(['ray', 'pydantic', 'boto3', 'pyarrow', 'diffusers']))"
    options = "['', '--steps', '1', '--batch', '1', '--runs', '1', '--no-techniques']"
    code = f"{absent}; sys.argv = {options}; from sdbatch.bench.__main__ import main; sys.exit(main())"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "images/s" in ended.stdout
