"""What the rest of a planned job will take, from what is known of its speed or is measured now."""

from __future__ import annotations

from dataclasses import dataclass

from sdbatch.engine.account import runs_for_estimates
from sdbatch.engine.calibrate import calibrate
from sdbatch.engine.costs.estimate import Estimate, estimate
from sdbatch.engine.costs.speeds import Conditions, find_speeds
from sdbatch.engine.planning.planner import Prepared
from sdbatch.ledger import Commits, Job, Shards, spent_usd


@dataclass(frozen=True)
class Forecast:
    """``left``: images to make. Estimates are None while no speed is known; ``fewest`` also for a pool of one size."""

    left: int
    estimate: Estimate | None
    fewest: Estimate | None
    spent_usd: float | None  # by earlier runs; None without a price


def forecast(prepared: Prepared, job: Job, shards: Shards, *, measure: bool) -> Forecast:
    """What the shards that are not committed yet will take; ``measure``: find out the speed by making a few batches."""
    resources, runs = prepared.spec.resources, runs_for_estimates(prepared.store)
    done = Commits(prepared.store).done(shards.column("number"), shards.column("slice"), 1)
    todo = shards.where(~done).makeable()
    price = resources.usd_per_actor_hour
    spent = None if price is None else spent_usd(runs, price)
    known = find_speeds(Conditions.of(prepared.spec, job.model_sha256), runs)
    speeds = calibrate(prepared, job, todo) if measure and len(todo) else known
    if speeds is None or not speeds.shapes:
        return Forecast(todo.images, None, None, spent)
    most, fewest = (
        estimate(todo, resources.at_once, resources, speeds, actors) for actors in (resources.most, resources.fewest)
    )
    return Forecast(todo.images, most, fewest if resources.fewest < resources.most else None, spent)
