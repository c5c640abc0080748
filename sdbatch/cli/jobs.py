"""Commands that take a job spec: validate, plan, run, schema."""

from __future__ import annotations

import datetime
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from sdbatch.cli.bills import bill_content, bill_lines, forecast_content, forecast_facts
from sdbatch.cli.console import facts, of_checks, people, print_json, tell, watching
from sdbatch.cli.preview import described, tell_requests
from sdbatch.spec import JobSpec, load_spec

if TYPE_CHECKING:
    from sdbatch.engine.runner import Outcome

Job = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job spec.")]
Set = Annotated[list[str], typer.Option("--set", metavar="FIELD=VALUE", help="Override a field: generate.seed=7.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Date = Annotated[
    datetime.datetime | None,
    typer.Option(formats=["%Y-%m-%d"], help="Fill in {date} and its like as of this day; today in UTC when left out."),
]
Extend = Annotated[
    bool, typer.Option("--extend", help="Also plan the rows that were added to the end of the input since.")
]
Show = Annotated[
    int, typer.Option("--show", metavar="N", min=0, max=10_000, help="Also show the first N images, prompt by prompt.")
]


def validate(job: Job, set_: Set = [], date: Date = None, as_json: Json = False) -> None:  # noqa: B006
    """Check a job spec, its input, model and output, and say every mistake."""
    from sdbatch.engine.planning.planner import (
        prepare,  # Ray and torch take seconds to import: only where they are needed
    )
    from sdbatch.engine.webhook import check_notify

    spec = load_spec(job, set_, date and date.date())
    check_notify(spec.notify)
    prepared = prepare(spec)
    size = sum(file.bytes for file in prepared.table.files)
    if as_json:
        print_json({"ok": True, "name": spec.name, "files": len(prepared.table.files), "bytes": size})
        return
    tell(f"[green]✓[/] {escape(str(job))} is fine")
    facts(
        {
            "input": f"{len(prepared.table.files)} {prepared.table.format} file(s), {size:,} bytes",
            "model": f"{escape(spec.model.uri)}, sha256 {prepared.model.sha256[:12]}…",
            "output": escape(prepared.store.uri),
        }
    )


def plan(
    job: Job,
    set_: Set = [],  # noqa: B006
    date: Date = None,
    extend: Extend = False,
    show: Show = 0,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Make a few batches, which are not stored, to know the job's speed.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Plan a job without making its images: count them, and estimate their size, time and cost."""
    from sdbatch.engine import runner

    spec = load_spec(job, set_, date and date.date())
    with watching() as watch:
        found = runner.plan(spec, watch, extend=extend, show=show, calibrate=calibrate)
    planned, size = found.job, found.job.spec["resources"]["batch_size"]
    makeable = found.shards.makeable()
    batches = int((-(-makeable.column("count") // size)).sum())
    images = makeable.images
    shapes = Counter[str]()
    for width, height, count in makeable.counted("width", "height"):
        shapes[f"{width}x{height}"] = count
    padding = 1 - images / (batches * size) if batches else 0.0
    summary = {
        "planned": planned.planned,
        "added": found.added,
        "makeable": images,
        "quarantined": planned.faulty,
        "shards": planned.shards,
        "batch_size": size,
        "batches": batches,
        "padding": round(padding, 4),
        "sizes": dict(shapes.most_common()),
        "fingerprint": planned.fingerprint,
        "output": spec.output.uri,
        **forecast_content(found.forecast, spec.resources),
    }
    if as_json:
        print_json(summary | ({"show": [described(request) for request in found.first]} if show else {}))
        return
    if show:
        tell_requests(found.first)
    tell(f"[bold]{spec.name}[/]: {planned.planned:,} images")
    if extend:
        _tell_added(found.added)
    shown = ", ".join(f"{shape} ({count:,})" for shape, count in shapes.most_common(4))
    facts(
        {
            "sizes": shown + (f" and {len(shapes) - 4} more" if len(shapes) > 4 else ""),
            "shards": f"{planned.shards:,} of up to {spec.output.shard_size}",
            "batches": f"{batches:,} of {size}, {100 * padding:.1f} % of their slots empty",
            "refused": f"{planned.faulty:,} requests, see 'sdbatch errors' after the run" if planned.faulty else "none",
            "plan": escape(f"{spec.output.uri}/_sdbatch/plan"),
            **forecast_facts(found.forecast, spec.resources),
        }
    )


def _tell_added(added: int) -> None:
    tell(f"{added:,} images were added to the plan" if added else "the input has no new rows: nothing was added")


def run(job: Job, set_: Set = [], date: Date = None, extend: Extend = False, as_json: Json = False) -> None:  # noqa: B006
    """Run a job; the same command goes on where a stopped run ended."""
    from sdbatch.engine import runner

    spec = load_spec(job, set_, date and date.date())
    with watching() as watch:
        outcome = runner.run(spec, watch, extend=extend)
    if extend and not as_json:
        _tell_added(outcome.added)
    report_outcome(outcome, as_json=as_json)


def report_outcome(outcome: Outcome, *, as_json: bool) -> None:
    """Tell how a run ended; exits with 3 when images are quarantined that no check dropped."""
    status = outcome.status
    rate = outcome.images / outcome.making_seconds if outcome.making_seconds else 0.0
    if as_json:
        print_json(
            {
                "state": status.state,
                "output": status.output,
                "planned": status.planned,
                "committed": status.committed,
                "quarantined": status.quarantined,
                "dropped": status.dropped,
                "added": outcome.added,
                "made_now": outcome.images,
                "images_per_second": round(rate, 3),
                "starting_seconds": round(outcome.starting_seconds, 3),
                "making_seconds": round(outcome.making_seconds, 3),
                "batches": outcome.batches,
                "actor_deaths": outcome.deaths,
                **bill_content(outcome.bill),
            }
        )
    else:
        mark = "[green]✓[/]" if not status.failed else "[yellow]![/]"
        tell(f"{mark} [bold]{status.name}[/] is {status.state}: {status.committed:,} of {status.planned:,} images")
        output = escape(status.output)
        told = {"output": output}
        if outcome.images:
            told["speed"] = f"{rate:.2f} images/s, after {outcome.starting_seconds:.1f} s to start"
        else:
            told["done"] = "there was nothing left to make"
        if status.quarantined:
            told["quarantined"] = (
                f"[red]{status.quarantined:,}[/]{of_checks(status.dropped)}, see: sdbatch errors {output}"
            )
        told["look"] = f"sdbatch report {output}"
        facts(told)
        tell(*bill_lines(outcome.bill))
    if status.failed:
        raise typer.Exit(3)


def schema() -> None:
    """Print the JSON schema of the job spec."""
    print(json.dumps(JobSpec.model_json_schema(), indent=2))
    people.file.flush()
