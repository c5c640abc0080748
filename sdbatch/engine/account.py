"""A run's account: what it takes, and the budget that it may not exceed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace

from sdbatch.engine.costs.estimate import Estimate, Purse, estimate, shapes_of, speed_of
from sdbatch.engine.costs.speeds import Conditions, Measured, Speeds, find_speeds, keep_speeds
from sdbatch.engine.making.generator import Receipt
from sdbatch.engine.making.pool import Pool
from sdbatch.engine.planning.planner import Prepared
from sdbatch.errors import BudgetSpent, Interrupted, StorageError
from sdbatch.ledger import Job, Run, Shards, begin_run, dollars, put_run, read_runs, spent_usd
from sdbatch.ledger.runs import LINE
from sdbatch.prompts import Shape
from sdbatch.spec import Resources
from sdbatch.storage import Store


@dataclass(frozen=True)
class Bill:
    """What a run took, beside the estimate that it began with. ``spent_usd``: by all runs of the output together."""

    run: Run = field(default_factory=Run)
    estimate: Estimate | None = None
    runs: int = 0
    spent_usd: float | None = None
    devices_before: tuple[str, ...] = ()  # that earlier runs made pictures on, if others than this one's


def check_budget(store: Store, resources: Resources) -> list[Run]:
    """The runs so far. Raises BudgetSpent where they cost all that the job may; nothing is started then."""
    if resources.budget_usd is None:
        return runs_for_estimates(store)
    runs = read_runs(store)
    spent = spent_usd(runs, resources.usd_per_actor_hour)
    if spent >= resources.budget_usd:
        raise BudgetSpent(_told(spent, resources.budget_usd))
    return runs


@contextmanager
def keeping_account(prepared: Prepared, job: Job, started: float, planning: float) -> Iterator[Account]:
    """An account for the length of a run, closed however it ends. ``started`` by time.perf_counter."""
    account = Account(prepared, job, started, planning)
    try:
        yield account
    except BudgetSpent:
        account.close("budget spent")
        raise
    except (Interrupted, KeyboardInterrupt):
        account.close("interrupted")
        raise
    except BaseException:
        account.close("failed")
        raise
    account.close("complete")


class Account:
    """What one driver's run takes. Its line in the ledger is written beside the work, never in its way."""

    def __init__(self, prepared: Prepared, job: Job, started: float, planning: float) -> None:
        self._store, self._resources, self._job = prepared.store, prepared.spec.resources, job
        self._started, self._planning = started, planning
        self._before = check_budget(self._store, self._resources)
        self._conditions = Conditions.of(prepared.spec, job.model_sha256)
        self._known = find_speeds(self._conditions, self._before)
        self._pools: list[Pool] = []
        self._shapes: dict[Shape, Measured] = {}
        self._estimate: Estimate | None = None
        self._run = begin_run(
            self._store,
            Run(
                gpus_per_actor=self._resources.gpus_per_actor,
                usd_per_actor_hour=self._resources.usd_per_actor_hour,
                conditions=self._conditions.content(),
            ),
        )
        self._thread = ThreadPoolExecutor(1, "account")
        self._writing: Future[None] | None = None
        self._written = time.monotonic()

    def expect(self, shards: Shards) -> None:
        """Estimate what these will take. Raises BudgetSpent where the budget would not even pay for the first batch."""
        if self._known is None or not self._known.shapes or not len(shards):
            return
        resources = self._resources
        self._estimate = estimate(shards, resources.at_once, resources, self._known, resources.most)
        self._run = replace(self._run, estimate=asdict(self._estimate))
        purse, actors = self.purse(shards), self._estimate.actors
        needed = actors * (self._known.loading_seconds + purse.a_batch)
        if purse.seconds <= needed and resources.budget_usd is not None:
            price = (resources.usd_per_actor_hour or 0.0) / 3600
            why = f"the rest does not pay for {actors} actor(s) to load the model and make a batch each: "
            spent = resources.budget_usd - purse.seconds * price
            raise BudgetSpent(_told(spent, resources.budget_usd, why + dollars(needed * price)))

    def purse(self, shards: Shards) -> Purse:
        """What may still be spent on these shards."""
        budget, price = self._resources.budget_usd, self._resources.usd_per_actor_hour
        if budget is None or price is None:
            return Purse()
        left = (budget - spent_usd(self._before, price)) * 3600 / price - self._actor_seconds()
        if self._known is None or not self._known.shapes:
            return Purse(left)
        return Purse(left, max(speed_of(shape, self._known)[0].a_batch for shape, _ in shapes_of(shards)))

    def follow(self, pool: Pool) -> None:
        """What this pool takes goes on the account."""
        self._pools.append(pool)

    def count(self, receipt: Receipt, edition: int) -> None:
        """A shard is done. Editions after the first tell nothing of speed: their batches are full of what stays."""
        self._run = replace(
            self._run,
            images=self._run.images + (receipt.committed if edition == 1 else receipt.measured.images),
            batches=self._run.batches + receipt.batches,
            bytes=self._run.bytes + receipt.measured.bytes,
        )
        if edition == 1 and receipt.batches:
            so_far = self._shapes.get(receipt.shape, Measured())
            self._shapes[receipt.shape] = so_far.plus(receipt.measured)

    def line(self) -> None:
        """Write down how things stand, if the last time is a while ago and not still going on."""
        if time.monotonic() - self._written >= LINE and (self._writing is None or self._writing.done()):
            self._written = time.monotonic()
            self._writing = self._thread.submit(self._put, self._now(""))

    def close(self, ended: str) -> None:
        """The last line, and what was learnt about speed."""
        self._thread.shutdown()
        self._run = self._now(ended)
        speeds = self._speeds()
        if speeds is not None:
            self._run = replace(self._run, speeds=speeds.content())
            keep_speeds(self._conditions, speeds)
        self._put(self._run)

    def bill(self) -> Bill:
        """What was taken so far, by this run and by all."""
        run, price = self._now("complete"), self._resources.usd_per_actor_hour
        spent = None if price is None else spent_usd([*self._before, run], price)
        others = {before.device for before in self._before if before.images} - {run.device, ""}
        return Bill(run, self._estimate, len(self._before) + 1, spent, tuple(sorted(others)) if run.images else ())

    def out_of_money(self, left: int) -> BudgetSpent:
        """What to raise when a pool had to stop with so many images left."""
        spent, budget = self.bill().spent_usd or 0.0, self._resources.budget_usd or 0.0
        return BudgetSpent(_told(spent, budget, f"{left:,} of {self._job.planned:,} images are left to make"))

    def _now(self, ended: str) -> Run:
        return replace(
            self._run,
            ended=ended,
            actors=0 if ended else sum(pool.actors for pool in self._pools),
            actor_seconds=round(self._actor_seconds(), 3),
            wall_seconds=round(time.perf_counter() - self._started, 3),
            deaths=sum(pool.deaths for pool in self._pools),
            device=next((found for pool in self._pools if (found := pool.environment.get("device"))), ""),
        )

    def _actor_seconds(self) -> float:
        return sum(pool.actor_seconds() for pool in self._pools)

    def _speeds(self) -> Speeds | None:
        loads = [seconds for pool in self._pools for seconds in pool.loads]
        ready = next((pool for pool in self._pools if pool.ready_at is not None), None)
        if ready is None or ready.ready_at is None or not self._shapes:
            return None
        return Speeds(
            device=ready.environment.get("device", ""),
            starting_seconds=round(ready.ready_at - self._started - self._planning, 3),
            loading_seconds=round(sum(loads) / len(loads), 3),
            at=round(time.time(), 1),
            shapes=self._shapes,
        )

    def _put(self, run: Run) -> None:
        with suppress(StorageError):  # the next line will say it, or the next run's allowance for a killed driver
            put_run(self._store, run)


def runs_for_estimates(store: Store) -> list[Run]:
    """The runs so far, or none where a record is damaged: without a budget that stops nothing."""
    try:
        return read_runs(store)
    except StorageError:
        return []


def _told(spent: float, budget: float, why: str = "") -> str:
    return (
        f"resources.budget_usd: {dollars(spent)} of {dollars(budget)} are spent{why and f'; {why}'}. What is committed "
        "stays: raise resources.budget_usd, and the same command goes on ('sdbatch plan' tells what the rest will cost)"
    )
