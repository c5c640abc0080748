"""What a bench found: as it is measured, as JSON, as a plot."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from sdbatch import __version__
from sdbatch.bench.back_to_back import NAME, measure_back_to_back
from sdbatch.bench.clock import Setting
from sdbatch.bench.duel import duel
from sdbatch.bench.floor import count_flops, peak_flops, settle
from sdbatch.bench.plot import draw_plot
from sdbatch.bench.quality import find_scorer, gate
from sdbatch.bench.rival import check_rival
from sdbatch.bench.sizes import checkpoint_of
from sdbatch.bench.techniques import TECHNIQUES, Technique, as_in_jobs, float8
from sdbatch.bench.waterfall import Row, attempt, by_batch, phases, prepared, waterfall
from sdbatch.diffusion import SAMPLERS
from sdbatch.diffusion.checkpoint import Checkpoint
from sdbatch.diffusion.compilation import lacking as compiler_lacking
from sdbatch.diffusion.float8 import lacking
from sdbatch.diffusion.processor import compute_alike, processor
from sdbatch.diffusion.weights import DTYPES
from sdbatch.errors import JobFailed, OutputError, UsageError


@dataclass(frozen=True)
class Wanted:
    """What to measure. Sizes that are left out are the model's own."""

    model: str = "builtin:shapes"
    device: str = "cpu"
    dtype: str = ""
    width: int | None = None
    height: int | None = None
    steps: int = 20
    guidance: float = 5.0
    sampler: str = "euler"
    batch: int = 8
    batches: tuple[int, ...] = ()
    runs: int = 3
    threads: int = 1
    compiles: bool = False
    techniques: bool = True
    against: str = ""
    gate: int = 0
    scorer: str = ""
    out: Path | None = None


Tell = Callable[[str], None]


def bench(wanted: Wanted, tell: Tell) -> dict[str, Any]:
    """Measure; ``tell`` hears a line for each row as it is done.

    Raises UsageError or ModelError, JobFailed for what finds no room, and in the end for what does not pass the gate.
    """
    _check(wanted)
    try:
        return _measured(wanted, tell)
    except torch.OutOfMemoryError:
        raise JobFailed(f"bench: a batch of {wanted.batch} does not fit the device's memory; lower --batch") from None


def _measured(wanted: Wanted, tell: Tell) -> dict[str, Any]:
    compute_alike(wanted.threads)
    checkpoint = checkpoint_of(wanted.model)
    own = checkpoint.default_size
    dtype = wanted.dtype or ("bfloat16" if wanted.device == "cuda" else "float32")
    setting = Setting(
        wanted.width or own[0],
        wanted.height or own[1],
        wanted.steps,
        wanted.guidance,
        wanted.sampler,
        wanted.device,
        dtype,
        wanted.threads,
    )
    flops = count_flops(checkpoint, setting.width, setting.height)
    peak = peak_flops(wanted.device, dtype)
    most = peak / flops.of_picture(setting.evaluations)  # images a second
    found: dict[str, Any] = {
        "model": wanted.model,
        **asdict(setting),
        **_machine(wanted.device),
        "tflop": {name: round(count / 1e12, 4) for name, count in asdict(flops).items()},
        "peak_tflops": round(peak / 1e12, 3),
        "floor_images_a_second": round(most, 3),
        "rows": [],
        "duels": [],
    }
    tell(
        f"{wanted.model} {setting.width}x{setting.height}, {setting.steps} steps, {dtype}: "
        f"{flops.unet / 1e12:.3f} TFLOP a look, {flops.decoder / 1e12:.3f} to decode; "
        f"{peak / 1e12:.2f} TFLOP/s, so at most {most:.2f} images/s"
    )
    _keep(found, wanted.out)  # if that can't be done, better told now

    def add(row: Row) -> Row:
        found["rows"].append(_told(row, most))
        tell(_line(found["rows"][-1]))
        _keep(found, wanted.out)
        return row

    fields = ["model.compile"] if wanted.compiles and compiler_lacking(wanted.device) is None else []
    kept = as_in_jobs(wanted.device, *fields)
    if wanted.techniques:
        tried = [technique for technique in TECHNIQUES if wanted.compiles or technique.of != "compiler"]
        for row, best in waterfall(checkpoint, setting, wanted.batch, wanted.runs, tried):
            add(row)
            kept = best
    else:
        for row in by_batch(checkpoint, setting, kept, [wanted.batch], wanted.runs):
            add(row)
    found["kept"] = [technique.name for technique in kept]
    found["fields"] = [technique.field for technique in kept if technique.field is not None]
    _look_inside(found, tell, checkpoint, setting, kept, wanted.batch)
    job = add(_back_to_back(checkpoint, setting, kept, wanted.batch, wanted.runs))
    for row in by_batch(checkpoint, setting, kept, wanted.batches, wanted.runs):
        add(row)
    if all(row["lacking"] for row in found["rows"]):
        raise JobFailed(f"bench: nothing could be measured: {found['rows'][0]['lacking']}; a lower --batch takes less")
    if job.timing is not None:
        found["job"] = found["rows"][[row["name"] for row in found["rows"]].index(NAME)]
        how = "".join(f", {field}: true" for field in found["fields"])
        share = 100 * found["job"]["share_of_floor"]
        tell(f"a job makes {job.timing.images_a_second:.3f} images/s, {share:.1f} % of the floor{how}")
    for fight in _duels(wanted, checkpoint, setting, kept):
        found["duels"].append(fight)
        _keep(found, wanted.out)
        tell(
            "batch {batch}: not measured: {lacking}".format(**fight)
            if "lacking" in fight
            else "batch {batch}: ours {ours:.3f} images/s, diffusers ({recipe}) {theirs:.3f}: "
            "{ratio:.3f} × ({ratio_from:.3f} to {ratio_to:.3f})".format(**fight)
        )
    quality = None
    if wanted.gate:
        scorer = find_scorer(wanted.scorer, wanted.model, wanted.device)
        quality = gate(checkpoint, setting, float8, wanted.gate, wanted.batch, scorer, *fields)
        found["gate"] = quality.told()
        tell(f"model.fp8, {quality.line()}")
    if wanted.out is not None:
        _keep(found, wanted.out)
        tell(f"written: {wanted.out / 'bench.json'}")
        if find_spec("matplotlib") is None:
            tell("no plot: that needs Matplotlib: pip install 'sdbatch[training]'")
        else:
            (wanted.out / "bench.png").write_bytes(draw_plot(found))
            tell(f"drawn: {wanted.out / 'bench.png'}")
    if quality is not None:
        quality.refuse("model.fp8")
    return found


def _look_inside(
    found: dict[str, Any],
    tell: Tell,
    checkpoint: Checkpoint,
    setting: Setting,
    kept: Sequence[Technique],
    batch: int,
) -> None:
    """How long the model takes to load, and the parts of a batch."""

    def look() -> tuple[float, dict[str, float]]:
        began = time.perf_counter()
        subject = prepared(checkpoint, setting, kept)
        settle(setting.device)
        return time.perf_counter() - began, phases(subject, setting, batch)

    looked = attempt(look)
    if isinstance(looked, str):
        tell(f"a batch's parts: not measured: {looked}")
        return
    loading, found["phases"] = looked
    if checkpoint.layout != "random":
        found["loading_seconds"] = round(loading, 3)
        tell(f"loaded in {loading:.2f} s: what a process takes before its first, cold batch")
    tell("a batch's text, step and decoding: " + ", ".join(f"{s * 1e3:.1f} ms" for s in found["phases"].values()))


def _back_to_back(checkpoint: Checkpoint, setting: Setting, kept: Sequence[Technique], batch: int, runs: int) -> Row:
    """The row of what jobs do; other bytes than one batch after the other has are a mistake of ours."""
    made = attempt(lambda: measure_back_to_back(prepared(checkpoint, setting, kept), setting, batch, runs))
    if isinstance(made, str):
        return Row(NAME, lacking=made)
    timing, same = made
    if not same:
        return Row(NAME, lacking="pictures have other bytes than one batch after the other", same_bytes=False)
    return Row(NAME, timing, kept=True, same_bytes=True)


def _duels(
    wanted: Wanted, checkpoint: Checkpoint, setting: Setting, kept: Sequence[Technique]
) -> Iterator[dict[str, Any]]:
    for batch in (wanted.batches or (wanted.batch,)) if wanted.against else ():
        turns = max(wanted.runs, 5)
        fight = attempt(partial(duel, checkpoint, setting, kept, batch, turns, compiled=wanted.compiles))
        yield {"batch": batch, "lacking": fight} if isinstance(fight, str) else fight.told()


def _check(wanted: Wanted) -> None:
    if wanted.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("bench: --device cuda: there is no CUDA device here")
    if wanted.dtype and wanted.dtype not in DTYPES:
        raise UsageError(f"bench: --dtype '{wanted.dtype}' is not known; use one of {', '.join(DTYPES)}")
    if wanted.sampler not in SAMPLERS:
        raise UsageError(f"bench: --sampler '{wanted.sampler}' is not known; use one of {', '.join(SAMPLERS)}")
    if wanted.against not in {"", "diffusers"}:
        raise UsageError(f"bench: --against '{wanted.against}' is not known; use diffusers")
    if wanted.against:
        check_rival(wanted.sampler)
    if wanted.gate and (reason := lacking(wanted.device)):
        raise UsageError(f"bench: --gate: model.fp8 {reason}")


def _keep(found: dict[str, Any], out: Path | None) -> None:
    """Write what is known so far. Raises OutputError where that can't be done."""
    if out is None:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "bench.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"bench: --out: {error.filename or out}: {error.strerror}; name another folder") from None


def _machine(device: str) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    when = time.strftime("%Y-%m-%d", time.gmtime())
    return {"hardware": name, "torch": str(torch.__version__), "sdbatch": __version__, "date": when}


def _told(row: Row, most: float) -> dict[str, Any]:
    told = {name: value for name, value in asdict(row).items() if name != "timing"}
    if row.timing is not None:
        told |= row.timing.told() | {"share_of_floor": round(row.timing.images_a_second / most, 4)}
    return told


def _line(row: dict[str, Any]) -> str:
    if row["lacking"]:
        return f"{row['name']:<33} not measured: {row['lacking']}"
    memory = f"{row['peak_bytes'] / 1e9:6.2f} GB" if row["peak_bytes"] is not None else ""
    moved = "" if row["psnr"] is None else f"  {row['psnr']:.0f} dB from the first row"
    return (
        f"{row['name']:<33} {row['images_a_second']:8.3f} images/s ({row['from']:.3f} to {row['to']:.3f})"
        f"  {100 * row['share_of_floor']:5.1f} % of the floor {memory}  cold {row['cold']:.1f} s"
        f"{'  kept' if row['kept'] else '' if row['in_jobs'] else '  no job can'}{moved}"
        f"{'  the same bytes' if row['same_bytes'] else ''}"
    )
