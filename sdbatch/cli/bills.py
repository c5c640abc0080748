"""Estimates and bills: what a job will take, and what it took, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from sdbatch.cli.console import plain, size, span
from sdbatch.ledger import dollars
from sdbatch.spec import Resources

if TYPE_CHECKING:  # the engine imports Ray, which commands that only read do not need
    from sdbatch.engine.account import Bill
    from sdbatch.engine.costs.estimate import Estimate
    from sdbatch.engine.forecast import Forecast


def forecast_content(found: Forecast, resources: Resources) -> dict[str, Any]:
    """What ``plan --json`` has of it."""
    return {
        "left": found.left,
        "estimate": None if found.estimate is None else asdict(found.estimate),
        "estimate_fewest_actors": None if found.fewest is None else asdict(found.fewest),
        "spent_usd": found.spent_usd,
        "budget_usd": resources.budget_usd,
    }


def forecast_facts(found: Forecast, resources: Resources) -> dict[str, str]:
    """What ``plan`` tells of it, by name."""
    told = {}
    most, fewest = found.estimate, found.fewest
    if most is None:
        told["estimate"] = "not measured yet: run with --calibrate for size, time and cost"
    elif not most.images:
        told["estimate"] = "nothing is left to make"
    else:
        told["left"] = f"{found.left:,} images in {most.batches:,} batches"
        scaled = f"; {100 * most.scaled:.0f} % of it scaled from other shapes" if most.scaled else ""
        told["speed"] = f"{most.seconds_a_batch:.3g} s a batch on {plain(most.device)}, by {most.source}{scaled}"
        told["size"] = _size(most.bytes)
        told["time"] = f"{_time(most)}, {span(most.starting_seconds)} of it to start"
        if fewest is not None:
            told["time"] += f"; {_time(fewest)}"
        told["pool"] = _hours(most.actor_hours, most.gpu_hours)
        if most.usd is not None:
            told["cost"] = dollars(most.usd)
            if fewest is not None and fewest.usd is not None:
                told["cost"] += f"; {dollars(fewest.usd)} with {fewest.actors}"
    if found.spent_usd:
        told["spent"] = f"{dollars(found.spent_usd)} so far"
    if resources.budget_usd is not None:
        told["budget"] = dollars(resources.budget_usd)
        if most is not None and most.usd is not None and most.usd + (found.spent_usd or 0) > resources.budget_usd:
            told["budget"] += " [yellow]will not be enough[/]: the job stops before it is exceeded, and can be resumed"
    return told


def bill_content(bill: Bill) -> dict[str, Any]:
    """What ``run --json`` has of it."""
    run = bill.run
    took = {
        "wall_seconds": run.wall_seconds,
        "actor_hours": round(run.charged_seconds / 3600, 6),
        "gpu_hours": round(run.gpu_hours, 6),
        "usd": None if run.usd_per_actor_hour is None else round(run.usd(), 6),
        "bytes": run.bytes,
    }
    estimate = None if bill.estimate is None else asdict(bill.estimate)
    content = {"took": took, "estimate": estimate, "runs": bill.runs, "spent_usd": bill.spent_usd}
    return content | {"device": run.device, "devices_before": list(bill.devices_before)}


def bill_lines(bill: Bill) -> list[str]:
    """A small table: what the run took, beside its estimate."""
    run, before = bill.run, bill.estimate
    if not run.batches:
        return []
    rows = [
        ("", "took", "estimate" if before else "no estimate: its speed was not known before"),
        ("time", span(run.wall_seconds), span(before.wall_seconds) if before else ""),
        (
            "pool",
            _hours(run.charged_seconds / 3600, run.gpu_hours),
            _hours(before.actor_hours, before.gpu_hours) if before else "",
        ),
        ("size", _size(run.bytes), _size(before.bytes) if before else ""),
    ]
    if run.usd_per_actor_hour is not None:
        rows.append(("cost", dollars(run.usd()), dollars(before.usd) if before and before.usd is not None else ""))
    width = max(len(took) for _, took, _ in rows)
    lines = [f"  [dim]{name:<4}[/]  {took:<{width}}  {estimated}".rstrip() for name, took, estimated in rows]
    if bill.runs > 1 and bill.spent_usd is not None:
        lines.append(f"  all {bill.runs} runs of this output together cost {dollars(bill.spent_usd)}")
    if bill.devices_before:
        others = escape(" and ".join(bill.devices_before))
        lines.append(
            f"  [yellow]Part of the pictures were made on {others}[/], now on {escape(run.device)}: where two devices "
            "round otherwise, the same request gives a picture that differs in its last bits"
        )
    return lines


def _time(found: Estimate) -> str:
    return f"{span(found.wall_seconds)} with {found.actors} {'actor' if found.actors == 1 else 'actors'}"


def _hours(actor_hours: float, gpu_hours: float) -> str:
    return f"{gpu_hours:.3g} GPU-hours" if gpu_hours else f"{actor_hours:.3g} actor-hours, no GPU"


def _size(bytes_: int | None) -> str:
    return "not known" if bytes_ is None else size(bytes_)
