"""The pool of generator actors: hands out shards, collects receipts, replaces actors that die.

Shards are handed out one small descriptor at a time, straight to actors: the driver knows who works on what,
so a death costs exactly the shards that the dead actor held, and every retry is counted.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import ray
from ray.exceptions import ActorUnschedulableError, RayError, RayTaskError, RuntimeEnvSetupError

from sdbatch.engine.generator import Generator, Receipt
from sdbatch.errors import JobFailed, SdbatchError
from sdbatch.ledger import Job, Shard
from sdbatch.spec import JobSpec

#: Shards an actor holds at once: one with the model, one being stored.
_HELD = 2
#: Seconds between two looks at how far the actors are.
_POLL = 1.0


@dataclass
class _Member:
    """One place in the pool and the actor that fills it."""

    number: int
    actor: Any
    load: ray.ObjectRef[Any]
    ready: bool = False
    held: dict[ray.ObjectRef[Any], Shard] = field(default_factory=dict)


class Pool:
    """Generator actors for one job. ``on_look(images_made, ready, deaths)`` is called about once a second."""

    def __init__(self, spec: JobSpec, job: Job, on_look: Callable[[int, int, int], None]) -> None:
        self._spec, self._job, self._on_look = spec, job, on_look
        resources = spec.resources
        options: dict[str, Any] = {
            "num_cpus": resources.cpus_per_actor,
            "num_gpus": resources.gpus_per_actor,
            "max_restarts": 0,  # who dies is replaced here, where deaths are counted
            "max_task_retries": 0,
            "concurrency_groups": {"shards": _HELD, "watch": 1},
        }
        self._remote: Any = ray.remote(**options)(Generator)
        self._settings = (spec.model_dump(mode="json"), ray.put(job))
        self._attempts: Counter[int] = Counter()
        self._deaths = 0
        self._spare_deaths = 2 * resources.actors + 2  # of actors that died before they ever were ready
        self.ready_at: float | None = None  # when the first actor had its model loaded
        self._members: list[_Member] = []
        self._waiting: Iterator[Shard] = iter(())
        self._again = deque[Shard]()  # taken back from the dead, and the first ones
        self._made: dict[int, int] = {}

    def run(self, shards: Iterable[Shard]) -> Iterator[Receipt]:
        """Have every shard made; yields receipts as they come. Raises JobFailed when that can't be done."""
        self._waiting = iter(shards)
        self._again.extend(islice(self._waiting, self._spec.resources.actors))
        self._members = [self._start(number) for number in range(len(self._again))]  # never more than shards
        looked = time.monotonic()
        try:
            while self._hand_out():
                refs = [ref for member in self._members for ref in member.held]
                refs += [member.load for member in self._members if not member.ready]
                done, _ = ray.wait(refs, num_returns=1, timeout=_POLL)
                for ref in done:
                    yield from self._settle(ref)
                if time.monotonic() - looked >= _POLL:
                    self._look()
                    looked = time.monotonic()
        finally:
            for member in self._members:
                ray.kill(member.actor)

    def _start(self, number: int) -> _Member:
        spec, job = self._settings
        actor = self._remote.remote(spec, job)
        return _Member(number, actor, actor.load.remote())

    def _hand_out(self) -> bool:
        """Fill up every actor that is ready, the emptiest first. False if there is nothing left to do at all."""
        left = True
        for held in range(_HELD):
            for member in self._members:
                if not member.ready or len(member.held) > held or not left:
                    continue
                shard = self._again.popleft() if self._again else next(self._waiting, None)
                if shard is None:
                    left = False
                    continue
                ref = member.actor.run_shard.options(concurrency_group="shards").remote(shard)
                member.held[ref] = shard
        # Actors that are still on their way when the last shard is done are not waited for.
        return any(member.held for member in self._members) or (left and bool(self._members))

    def _settle(self, ref: ray.ObjectRef[Any]) -> Iterator[Receipt]:
        member = next(member for member in self._members if ref in member.held or ref == member.load)
        try:
            result = ray.get(ref)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, SdbatchError):
                raise cause from None
            raise JobFailed(f"a generator failed: {type(cause).__name__}: {cause}") from None
        except (ActorUnschedulableError, RuntimeEnvSetupError) as error:
            raise JobFailed(f"a generator can't be started: {' '.join(str(error).split())}") from None
        except RayError as death:  # the actor or its node died, or ran out of memory
            self._bury(member, death)
            return
        if ref == member.load:
            member.ready = True
            self.ready_at = self.ready_at or time.perf_counter()
        else:
            del member.held[ref]
            yield result

    def _bury(self, member: _Member, death: RayError) -> None:
        """Take back a dead actor's shards and put another actor in its place, a bounded number of times."""
        ray.kill(member.actor)  # it may only be out of reach
        self._deaths += 1
        if not member.ready:
            self._spare_deaths -= 1
            if self._spare_deaths < 0:
                told = " ".join(str(death).split())
                raise JobFailed(f"generators die before the model is loaded, {self._deaths} times now: {told}")
        for shard in member.held.values():
            self._attempts[shard.number] += 1
            if self._attempts[shard.number] >= self._spec.failures.max_attempts:
                raise JobFailed(
                    f"shard {shard.number} was in work at the death of {self._attempts[shard.number]} generators "
                    "(failures.max_attempts); one of its requests may kill the process, or memory runs short: "
                    "see the Ray logs, or lower resources.batch_size"
                )
            self._again.append(shard)
        self._members[self._members.index(member)] = self._start(member.number)

    def _look(self) -> None:
        """Ask the living how many images they made; who is too busy to answer is asked again next time."""
        asked = {
            member.actor.images_made.options(concurrency_group="watch").remote(): member.number
            for member in self._members
            if member.ready
        }
        if asked:
            answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0.2)
            for ref in answered:
                try:
                    self._made[asked[ref]] = ray.get(ref)
                except RayError:
                    self._made.pop(asked[ref], None)
        ready = sum(member.ready for member in self._members)
        self._on_look(sum(self._made.values()), ready, self._deaths)
