"""The pool of generator actors: hands out shards, collects receipts, and sees to it that actors are there.

Shards are handed out one small descriptor at a time, straight to actors: the driver knows who works on what,
so a death costs exactly the shards that the dead actor held. What the actor's model was at is in the logbook:
the death is held against that batch, and in the end against the one request that kills. Deaths that nothing
explains end the job when nothing gets done between them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Generator as Receipts
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import ray
from ray.exceptions import ActorUnschedulableError, RayActorError, RayError, RayTaskError, RuntimeEnvSetupError

from sdbatch.engine.cluster import draining_nodes
from sdbatch.engine.costs.estimate import Purse
from sdbatch.engine.handing import HELD, takes_another
from sdbatch.engine.making.deaths import Death, inquire
from sdbatch.engine.making.generator import Generator, Receipt
from sdbatch.engine.making.logbook import Mark, Pen, open_logbook
from sdbatch.engine.models.compiled import keep_code, known_code
from sdbatch.errors import JobFailed, SdbatchError
from sdbatch.ledger import Job, Shard
from sdbatch.ledger.attempts import UNTRIED, Attempts, put_attempts, read_attempts, troubled_shards
from sdbatch.spec import JobSpec
from sdbatch.storage import open_store

#: Seconds between two looks at how far the actors are.
_POLL = 1.0
#: Deaths in a row at one place, with nothing done anywhere between them, that end the job: while the model is
#: loaded, and at any other time.
_LOADS, _IN_A_ROW = 2, 5
#: Requests found to kill, with nothing done between them, that end the job: it is hardly the requests then.
_KILLERS = 10


_BOTTOMLESS = Purse()


@dataclass(eq=False)
class _Member:
    """An actor of the pool. ``deaths``: of those in its place before it, with nothing done since."""

    number: int
    actor: Any
    load: ray.ObjectRef[Any]
    arrival: ray.ObjectRef[Any]  # tells its node once there is a process
    deaths: int
    ready: bool = False
    node: str = ""
    since: float | None = None  # when its process was there
    held: dict[ray.ObjectRef[Any], Shard] = field(default_factory=dict)
    made: int = 0  # images that left the model, when last asked
    delivered: int = 0  # images of the shards that it finished
    longest: float = 0.0  # seconds that a batch took until it was stored, at most, when last asked

    def seconds(self) -> float:
        """Since its process was there."""
        return 0.0 if self.since is None else time.monotonic() - self.since


@dataclass(frozen=True)
class Worker:
    """An actor as the driver last saw it. ``state``: loading, at work, waiting."""

    number: int
    node: str
    state: str
    images: int
    shards: tuple[int, ...]  # that it holds


class Pool:
    """Generator actors for one job. ``on_look(images_made, crew, deaths)`` is called about once a second.

    Before the purse is overdrawn the pool stops: what is in work is ended with the batch and kept, see ``stopped``.
    """

    def __init__(
        self,
        spec: JobSpec,
        job: Job,
        on_look: Callable[[int, tuple[Worker, ...], int], None],
        purse: Purse = _BOTTOMLESS,
    ) -> None:
        self._spec, self._on_look, self._purse = spec, on_look, purse
        resources = spec.resources
        options: dict[str, Any] = {
            "num_cpus": resources.cpus_per_actor,
            "num_gpus": resources.gpus_per_actor,
            "max_restarts": 0,  # who dies is replaced here, where deaths are counted
            "max_task_retries": 0,
            "concurrency_groups": {"shards": HELD, "watch": 1},
        }
        self._remote: Any = ray.remote(**options)(Generator)
        self._settings = (spec.model_dump(mode="json"), ray.put(job))
        self._logbook = open_logbook(known_code(spec.output.uri) if spec.model.compile else {})
        self._store = open_store(spec.output.uri)
        self._attempts: dict[str, Attempts] = {}
        self._troubled = troubled_shards(self._store)
        self._waiting: Iterator[Shard] = iter(())
        self._todo = deque[Shard]()  # the next of those, and before them what was taken back from the dead
        self._members: list[_Member] = []
        self._vacant: list[int] = []  # places of the dead that nobody has taken yet, by their deaths
        self._draining: set[str] = set()  # nodes that get no more shards
        self._hired = 0
        self._delivered = 0  # images, by actors that are gone
        self._kept = 0  # batches that outlive their makers, when last asked
        self._killers = 0  # found since anything got done
        self._looked = time.monotonic()
        self._paid = 0.0  # seconds of actors that are gone
        self.deaths = 0
        self.ready_at: float | None = None  # when the first actor had its model loaded
        self.loads: list[float] = []  # seconds that actors took from their process to their model
        self.environment: dict[str, str] = {}  # of the actor that was ready last
        self.stopped = False  # for the purse's sake

    def run(self, shards: Iterable[Shard]) -> Receipts[Receipt, None, None]:
        """Have every shard made; yields receipts as they come. Raises JobFailed when that can't be done."""
        self._waiting = iter(shards)
        try:
            while self._staff():
                refs = [ref for member in self._members for ref in member.held]
                refs += [member.load for member in self._members if not member.ready]
                done, _ = ray.wait(refs, num_returns=1, timeout=_POLL)
                for ref in done:
                    yield from self._settle(ref)
                if time.monotonic() - self._looked >= _POLL:
                    self._look()
                    self._looked = time.monotonic()
            if self._spec.model.compile:
                keep_code(self._spec.output.uri, ray.get(self._logbook.compiled.remote()))
        finally:
            for actor in (*(member.actor for member in self._members), self._logbook):
                ray.kill(actor)

    @property
    def actors(self) -> int:
        """Actors that have a process."""
        return sum(member.since is not None for member in self._members)

    def actor_seconds(self) -> float:
        """What all actors took so far, each from its process on, idle or not."""
        return self._paid + sum(member.seconds() for member in self._members)

    # -- who works on what -------------------------------------------------------------------------------

    def _staff(self) -> bool:
        """Give work to who is ready, let go whom there is none for, ask for more where it helps. False: all is done."""
        most = self._spec.resources.most
        self._todo.extend(islice(self._waiting, max(HELD * most + 1 - len(self._todo), 0)))
        at_hand = [member for member in self._members if member.ready and member.node not in self._draining]
        for held in range(HELD):  # the emptiest first
            for member in () if self.stopped else at_hand:
                if len(member.held) <= held and takes_another(held, len(self._todo), len(at_hand)):
                    self._hand(member, self._todo.popleft())
        for member in [member for member in self._members if not member.held]:
            if self.stopped or not self._todo or member.node in self._draining:
                self._leave(member)
        pending = sum(not member.ready for member in self._members)
        staying = sum(member.node not in self._draining for member in self._members)
        for _ in range(0 if self.stopped else min(most - staying, len(self._todo) - pending)):
            self._hire()
        return bool(self._members)

    def _hand(self, member: _Member, shard: Shard) -> None:
        run_shard = member.actor.run_shard.options(concurrency_group="shards")
        member.held[run_shard.remote(shard, self._tried(shard.stem))] = shard

    def _tried(self, stem: str) -> Attempts:
        if stem in self._troubled and stem not in self._attempts:
            self._attempts[stem] = read_attempts(self._store, stem)  # by an earlier driver
        return self._attempts.get(stem, UNTRIED)

    def _hire(self) -> None:
        """Ask for an actor. Until there is room for it, it shows in what Ray's autoscaler knows of demand."""
        self._hired += 1
        actor = self._remote.remote(*self._settings, Pen(self._logbook, self._hired))
        deaths = self._vacant.pop() if self._vacant else 0
        arrival = actor.node.options(concurrency_group="watch").remote()
        self._members.append(_Member(self._hired, actor, actor.load.remote(), arrival, deaths))

    def _leave(self, member: _Member) -> None:
        ray.kill(member.actor)  # or what is left of it: it may only be out of reach
        self._members.remove(member)
        self._delivered += member.delivered
        self._paid += member.seconds()

    # -- what comes of it --------------------------------------------------------------------------------

    def _settle(self, ref: ray.ObjectRef[Any]) -> Iterator[Receipt]:
        member = next(member for member in self._members if ref in member.held or ref == member.load)
        try:
            result = ray.get(ref)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, SdbatchError):
                raise cause from None
            raise JobFailed(f"a generator failed: {type(cause).__name__}: {cause}".rstrip(": ")) from None
        except (ActorUnschedulableError, RuntimeEnvSetupError) as error:
            raise JobFailed(f"a generator can't be started: {' '.join(str(error).split())}") from None
        except RayError as error:
            if isinstance(error, RayActorError) and error.actor_init_failed:
                raise JobFailed(f"a generator can't be started: {str(error).splitlines()[-1]}") from None
            self._bury(member, inquire(member.actor, error))
            return
        if ref == member.load:
            member.ready, self.environment = True, result
            member.since = member.since or self._looked
            self.loads.append(member.seconds())
            self.ready_at = self.ready_at or time.perf_counter()
        elif result is None:
            self._todo.appendleft(member.held.pop(ref))
        else:
            member.delivered += member.held.pop(ref).count
            self._got_on()
            yield result

    def _bury(self, member: _Member, death: Death) -> None:
        """Take back a dead actor's shards, find what is to blame, and leave its place to another."""
        self.deaths += 1
        mark, kept = ray.get(self._logbook.last.remote(member.number))
        if kept != self._kept:
            self._kept = kept
            self._got_on()
        self._todo.extendleft(reversed(member.held.values()))
        self._leave(member)
        blamed = mark is not None and not death.innocent and self._blame(mark, death)
        deaths = member.deaths + (not blamed)
        most = _LOADS if not member.ready and not death.machine else _IN_A_ROW
        if deaths >= most:
            when = "before the model was loaded" if not member.ready else "and nothing got done between their deaths"
            raise JobFailed(f"{deaths} generators died one after the other, {when}; the last: {death.how}")
        self._vacant.append(deaths)

    def _blame(self, mark: Mark, death: Death) -> bool:
        """Hold a death against the batch or the request that was in work, and write it down."""
        attempts = self._tried(mark.stem).after(mark.position, mark.alone, death.how)
        self._attempts[mark.stem] = attempts
        put_attempts(self._store, mark.stem, attempts)
        if mark.alone and attempts.killer(mark.position, self._spec.failures.max_attempts):
            self._killers += 1
            if self._killers > _KILLERS:
                raise JobFailed(
                    f"{self._killers} requests in a row each killed the process that made it, so it may not be them; "
                    f"see the Ray logs, or lower resources.batch_size if memory runs short; the last: {death.how}"
                )
        return True

    def _got_on(self) -> None:
        """Something got done: deaths so far were not in vain."""
        self._killers = 0
        self._vacant = [0] * len(self._vacant)
        for member in self._members:
            member.deaths = 0

    def _look(self) -> None:
        """Ask the living how many images they made; who is too busy to answer is asked again next time."""
        self._draining = draining_nodes()
        asked: dict[ray.ObjectRef[Any], tuple[_Member, str]] = {}
        for member in self._members:
            if member.ready:
                asked[member.actor.images_made.options(concurrency_group="watch").remote()] = member, "made"
                asked[member.actor.longest_batch.options(concurrency_group="watch").remote()] = member, "longest"
            if not member.node:
                asked[member.arrival] = member, "node"
        if asked:
            answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0.2)
            for ref in answered:
                member, fact = asked[ref]
                try:
                    setattr(member, fact, ray.get(ref))
                except RayError:
                    continue  # its shards will tell
                member.since = member.since or self._looked  # it may have been there since
        self._stop_in_time()
        crew = tuple(
            Worker(
                member.number,
                member.node,
                "loading" if not member.ready else "at work" if member.held else "waiting",
                max(member.made, member.delivered),
                tuple(shard.number for shard in member.held.values()),
            )
            for member in self._members
        )
        self._on_look(self._delivered + sum(worker.images for worker in crew), crew, self.deaths)

    def _stop_in_time(self) -> None:
        """Stop while the purse still pays for the batches in work. Who is told to halt is told only once."""
        at_work = [member for member in self._members if member.held]
        longest = max((member.longest for member in self._members), default=0.0)
        if not self.stopped and self._purse.is_spent(self.actor_seconds(), len(at_work), longest, 2 * _POLL):
            self.stopped = True
            for member in at_work:
                member.actor.halt.options(concurrency_group="watch").remote()
