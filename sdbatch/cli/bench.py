"""The bench command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from sdbatch.cli.console import print_json, tell
from sdbatch.cli.training import Device


def bench(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="sd15, sd21, sdxl or sd15-quarter with random weights, or what model.uri of a job spec could say.",
        ),
    ] = "builtin:shapes",
    device: Annotated[Device, typer.Option(help="What to measure.")] = Device.cpu,
    dtype: Annotated[str, typer.Option(help="As model.dtype; left out, float32 on the CPU, bfloat16 on a GPU.")] = "",
    width: Annotated[int | None, typer.Option(min=8, help="Pixels; the model's own when left out.")] = None,
    height: Annotated[int | None, typer.Option(min=8, help="Pixels; the model's own when left out.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 20,
    guidance: Annotated[float, typer.Option(min=0, help="As generate.guidance_scale.")] = 5.0,
    sampler: Annotated[str, typer.Option(help="As generate.sampler.")] = "euler",
    batch: Annotated[int, typer.Option(min=1, help="Pictures at once while techniques are compared.")] = 8,
    batches: Annotated[list[int], typer.Option(help="Then this many at once. Repeatable.")] = [],  # noqa: B006
    runs: Annotated[int, typer.Option(min=1, help="Batches to time for each row.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the CPU.")] = 1,
    compiles: Annotated[bool, typer.Option("--compile", help="Use torch's compiler too, which takes minutes.")] = False,
    techniques: Annotated[bool, typer.Option(help="Compare techniques one by one, and keep what helps.")] = True,
    against: Annotated[str, typer.Option(metavar="diffusers", help="Measure it in turns with ours.")] = "",
    gate: Annotated[
        int,
        typer.Option(
            min=0, help="Draw so many pictures with model.fp8 and without; exit with 1 if they are too far apart."
        ),
    ] = 0,
    scorer: Annotated[
        str, typer.Option(metavar="FOLDER", help="A CLIP model whose score counts, too; builtin:shapes brings its own.")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="A folder for bench.json and bench.png.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Measure how fast this machine makes pictures, technique by technique."""
    from sdbatch.bench.report import Wanted  # torch takes seconds to import
    from sdbatch.bench.report import bench as measure

    wanted = Wanted(
        model,
        device.value,
        dtype,
        width,
        height,
        steps,
        guidance,
        sampler,
        batch,
        tuple(batches),
        runs,
        threads,
        compiles,
        techniques,
        against,
        gate,
        scorer,
        out,
    )
    found = measure(wanted, lambda line: tell(escape(line)))
    if as_json:
        print_json(found)
