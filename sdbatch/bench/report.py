"""What a bench found: as it is measured, as JSON, as a plot."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from sdbatch import __version__
from sdbatch.bench.clock import Setting
from sdbatch.bench.duel import duel
from sdbatch.bench.floor import count_flops, peak_flops, settle
from sdbatch.bench.quality import find_scorer, gate
from sdbatch.bench.rival import check_rival
from sdbatch.bench.sizes import checkpoint_of
from sdbatch.bench.techniques import TECHNIQUES, as_in_jobs, float8
from sdbatch.bench.waterfall import Row, by_batch, phases, prepared, waterfall
from sdbatch.diffusion import SAMPLERS
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
    ours = kept = as_in_jobs(wanted.device, compiled=wanted.compiles)
    _keep(found, wanted.out)  # if that can't be done, better told now

    def add(row: Row) -> None:
        found["rows"].append(_told(row, most))
        tell(_line(found["rows"][-1]))
        _keep(found, wanted.out)

    if wanted.techniques:
        tried = [technique for technique in TECHNIQUES if wanted.compiles or technique.of != "compiler"]
        for row, best in waterfall(checkpoint, setting, wanted.batch, wanted.runs, tried):
            add(row)
            kept = best
    else:
        for row in by_batch(checkpoint, setting, kept, [wanted.batch], wanted.runs):
            add(row)
    found["kept"] = [technique.name for technique in kept]
    began = time.perf_counter()
    subject = prepared(checkpoint, setting, kept)
    settle(wanted.device)
    if checkpoint.layout != "random":
        found["loading_seconds"] = round(time.perf_counter() - began, 3)
        tell(f"loaded in {found['loading_seconds']:.2f} s: what a process takes before its first, cold batch")
    found["phases"] = phases(subject, setting, wanted.batch)
    del subject
    tell("a batch's text, step and decoding: " + ", ".join(f"{s * 1e3:.1f} ms" for s in found["phases"].values()))
    for row in by_batch(checkpoint, setting, kept, wanted.batches, wanted.runs):
        add(row)
    if wanted.against:
        sizes = wanted.batches or (wanted.batch,)
        found["ours"] = [technique.name for technique in ours]  # what a job can have, whatever else was kept
        for fight in duel(checkpoint, setting, ours, sizes, max(wanted.runs, 5), compiled=wanted.compiles):
            found["duels"].append(fight.told())
            _keep(found, wanted.out)
            tell(
                "batch {batch}: ours {ours:.3f} images/s, diffusers ({recipe}) {theirs:.3f}: "
                "{ratio:.3f} × ({ratio_from:.3f} to {ratio_to:.3f})".format(**found["duels"][-1])
            )
    quality = None
    if wanted.gate:
        scorer = find_scorer(wanted.scorer, wanted.model, wanted.device)
        quality = gate(checkpoint, setting, ours, float8, wanted.gate, wanted.batch, scorer)
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
    told: dict[str, Any] = {"name": row.name, "kept": row.kept, "lacking": row.lacking, "psnr": row.psnr}
    if row.timing is not None:
        told |= row.timing.told() | {"share_of_floor": round(row.timing.images_a_second / most, 4)}
    return told


def _line(row: dict[str, Any]) -> str:
    if row["lacking"]:
        return f"{row['name']:<30} not measured: {row['lacking']}"
    memory = f"{row['peak_bytes'] / 1e9:6.2f} GB" if row["peak_bytes"] is not None else ""
    moved = "" if row["psnr"] is None else f"  {row['psnr']:.0f} dB from the first row"
    return (
        f"{row['name']:<30} {row['images_a_second']:8.3f} images/s ({row['from']:.3f} to {row['to']:.3f})"
        f"  {100 * row['share_of_floor']:5.1f} % of the floor {memory}  cold {row['cold']:.1f} s"
        f"{'  kept' if row['kept'] else ''}{moved}"
    )


def draw_plot(found: dict[str, Any]) -> bytes:
    """A PNG: a bar a row, with its spread. Needs Matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a second to import, and not everybody has it
    from matplotlib.figure import Figure

    rows: Sequence[dict[str, Any]] = [row for row in found["rows"] if not row["lacking"]]
    figure = Figure(figsize=(10, 1.5 + 0.36 * len(rows)), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    rates = [row["images_a_second"] for row in rows]
    below = [max(row["images_a_second"] - row["from"], 0.0) for row in rows]
    above = [max(row["to"] - row["images_a_second"], 0.0) for row in rows]
    axes.barh(
        range(len(rows)),
        rates,
        xerr=[below, above],
        color=["#1f5fa8" if row["kept"] else "#8ab8e6" for row in rows],
        error_kw={"ecolor": "#55585e", "elinewidth": 1, "capsize": 2},
    )
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("images/s (dark: kept)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{found['model']}, {found['width']}x{found['height']}, {found['steps']} steps, {found['dtype']}, "
        f"{found['hardware']}, torch {found['torch']}, {found['date']}",
        x=0.01,
        ha="left",
        fontsize=10,
        parse_math=False,
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
