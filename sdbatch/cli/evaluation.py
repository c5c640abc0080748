"""The evaluate command."""

from __future__ import annotations

from itertools import product
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from sdbatch.cli.console import bar, facts, people, print_json, tell, watching
from sdbatch.spec import Generate

_DEFAULT = Generate()


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="What model.uri of a job spec could say.")],
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="A folder or s3://bucket/prefix for the results.")],
    prompts_per_cell: Annotated[int, typer.Option(min=1, help="Prompts of each of the four kinds.")] = 500,
    sampler: Annotated[list[str], typer.Option(metavar="NAME", help="Repeatable.")] = [_DEFAULT.sampler],  # noqa: B006
    steps: Annotated[list[int], typer.Option(help="Repeatable.")] = [_DEFAULT.num_inference_steps],  # noqa: B006
    guidance: Annotated[list[float], typer.Option(help="Repeatable.")] = [_DEFAULT.guidance_scale],  # noqa: B006
    seed: Annotated[int, typer.Option(min=0, help="Of prompts and pictures.")] = 0,
    set_: Annotated[
        list[str],
        typer.Option("--set", metavar="FIELD=VALUE", help="Override a field of the job: resources.actors=4."),
    ] = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Measure how well a model draws what its prompts say.

    Prompts tell of one shape or two: their colours, sizes, places and the
    background, in combinations that the built-in model was trained on ("seen")
    and in others that it never saw ("novel"). Several samplers, steps and
    guidances are combined, all on the same prompts and noise. Of a model that
    was not trained on these drawn shapes this tells whether it can draw simple
    shapes, and nothing more. The same command goes on where a stopped one ended.
    """
    from sdbatch.engine import runner  # Ray and torch take seconds to import
    from sdbatch.engine.cluster import ray_session
    from sdbatch.evaluation import job, tables
    from sdbatch.evaluation.prompts import Setting

    settings = [Setting(*values) for values in product(sampler, steps, guidance)]
    evaluation = job.prepare(model, output, settings, prompts_per_cell, seed, set_)
    with ray_session(evaluation.spec.resources):
        with watching() as watch:
            outcome = runner.run(evaluation.spec, watch)
        with bar("reading the pictures") as update:
            fidelity, content = job.measure(evaluation, lambda done, total: update(done, total, "shards"))
    where = evaluation.store.uri
    if as_json:
        print_json({"output": where, "made_now": outcome.images, **content})
    else:
        tell(f"[green]✓[/] [bold]{escape(model)}[/]: {content['pictures']:,} pictures held against their prompts")
        for grid in tables.grids(fidelity, tables.short):
            shown = Table(box=None, padding=(0, 1, 0, 0))
            for at, name in enumerate(grid.columns):
                shown.add_column(name, justify="left" if at < grid.labels else "right")
            for row in grid.rows:
                shown.add_row(*row)
            tell("", f"[dim]{grid.title}[/]")
            people.print(shown)
        tell("")
        told = {name: escape(f"{where}/{file}") for name, file in job.RESULTS.items()}
        if outcome.status.quarantined:
            errors = escape(f"sdbatch errors {evaluation.spec.output.uri}")
            told["quarantined"] = f"[red]{outcome.status.quarantined:,}[/], see: {errors}"
        facts(told)
    if outcome.status.quarantined:
        raise typer.Exit(3)
