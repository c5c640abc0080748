"""The inspect command."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.markup import escape

from sdbatch.cli.console import facts, print_json, tell
from sdbatch.errors import ModelError


def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="What model.uri of a job spec could say.")],
    tokenizer: Annotated[str | None, typer.Option(help="As model.tokenizer.")] = None,
    prediction_type: Annotated[str | None, typer.Option(help="As model.prediction_type.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Tell what a model is, how large, and what it lacks; nothing is loaded."""
    from sdbatch.diffusion.inspection import inspect as look  # torch takes seconds to import
    from sdbatch.engine.models.loading import bring

    if prediction_type not in {None, "epsilon", "v_prediction"}:
        raise ModelError(f"--prediction-type is '{prediction_type}'; use epsilon or v_prediction")
    found = look(bring(model), None if tokenizer is None else bring(tokenizer), prediction_type)
    if as_json:
        print_json({**asdict(found), "uri": model})
    else:
        if found.family is not None:
            snr = ", zero terminal SNR" if found.zero_terminal_snr else ""
            sizes = {
                network.name: f"{network.parameters:,} parameters in {'/'.join(network.stored_as)}, "
                f"{network.bytes / 1e6:,.1f} MB"
                for network in found.networks
            }
            peak = found.half_precision_peak
            memory = {"memory": f"{peak / 1e9:,.2f} GB at batch 1 in float16, as computed"} if peak else {}
            tell(f"[bold]{escape(model)}[/] is {found.family}")
            facts(
                {
                    "layout": f"{found.layout}, {escape(str(found.path))}",
                    "predicts": f"{found.prediction_type}{snr}",
                    "size": f"{found.width}x{found.height} pixels",
                    **sizes,
                    **memory,
                    "tokenizer": escape("; ".join(dict.fromkeys(found.tokenizers))),
                }
            )
        for problem in found.problems:
            tell(f"[red]✗[/] {escape(problem)}")
        if not found.problems:
            tell("[green]✓[/] every weight is there")
    if found.problems:
        raise typer.Exit(2)
