"""Making again: quarantined requests that deserve another try, pictures that were lost or altered."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from sdbatch.engine.planning.planner import Prepared, prepare
from sdbatch.engine.runner import Outcome, driving, finish
from sdbatch.engine.snapshot import Watch
from sdbatch.engine.webhook import check_notify, telling
from sdbatch.errors import InputError, ModelError, Problem, SpecError, UsageError
from sdbatch.ledger import (
    DROPPED,
    Again,
    CommitRecord,
    Commits,
    Job,
    Round,
    Rounds,
    examine,
    newest_round,
    put_round,
    read_job,
    read_shards,
    read_status,
    renew_totals,
)
from sdbatch.outputs import check_columns, decode_metadata, opens, read_stored
from sdbatch.spec import overridden, parse_spec
from sdbatch.storage import Store

#: What decides no picture, where things lie and who does the work: any command that makes pictures takes it, for
#: itself alone.
_HERE = (
    "input.uri",
    "prompt.wildcards",
    "model.uri",
    "model.tokenizer",
    "checks.clip_score.model",
    "checks.safety.model",
    "resources.actors",
    "resources.usd_per_gpu_hour",
    "resources.budget_usd",
    "failures.",
    "notify.",
)
#: What says where things lie and more, which has to stay.
_PARTLY_HERE = ("model.loras", "model.embeddings", "output.c2pa.")
#: What may also be changed for a retry: what the plan has fixed for each request may not.
_CHANGEABLE = (
    "model.",
    "resources.",
    "output.image.quality",
    "output.image.lossless",
    "output.c2pa.",
    "generate.eta",
    "generate.guidance_rescale",
    "generate.guidance_interval",
    "generate.clip_skip",
    "checks.",
)
_READERS = 8
#: What of the spec is otherwise, a shard's record, and the positions that are to be made so.
_Found = tuple[tuple[str, ...], CommitRecord, tuple[int, ...]]


def retry(store: Store, changed: Sequence[str], watch: Watch) -> Outcome:
    """Run the quarantined requests again, with their seeds and in their slots.

    ``changed`` are fields of the spec, ``field=value``, that are to be otherwise this time; those that decide what
    pictures look like are recorded. Requests that were refused at plan time stay so, and pictures that checks dropped
    unless something that decides has changed: the same seeds would give the same pictures. What an earlier run left
    undone is made, too, but not with such changes.
    """
    _check_changeable(changed, (*_HERE, *_CHANGEABLE), "a retry")
    for change in changed:
        if change in {"model.dtype=auto", "resources.batch_size=auto"}:
            raise SpecError("--set", [Problem(change, "is decided with the plan, which stands", "write a value")])
    recorded = deciding_of(changed)
    here = [change for change in changed if change not in recorded]

    def quarantined(job: Job) -> Iterator[_Found]:
        return ((recorded, *found) for found in _quarantined(store, job, bool(recorded)))

    return _again(store, "retry", recorded, here, quarantined, watch)


def deciding_of(changed: Sequence[str]) -> tuple[str, ...]:
    """Of the changes for a retry those that decide what pictures look like, or may."""
    return tuple(change for change in changed if not change.startswith(_HERE))


def repair(store: Store, here: Sequence[str], watch: Watch, progress: Callable[[int, int], None]) -> Outcome:
    """Make again what ``verify`` finds missing or altered, and what an earlier run left undone; remove leftovers.

    A shard whose record is wrong, or what lies beside its pictures, gets a new edition with the same pictures. Pictures
    that a retry made with other settings are made with these again, in a round of their own. ``here``: see
    :func:`prepared_again`.
    """

    def damaged(job: Job) -> Iterator[_Found]:
        renew_totals(store)
        rounds = Rounds(store)
        for done, found in enumerate(examine(store, job, read_stored, opens), 1):
            progress(done, job.shards)
            for key in found.leftover:
                store.delete(key)
            if found.record is not None and not found.sound:
                by_changes: dict[tuple[str, ...], list[int]] = {} if found.damaged else {(): []}
                for position in found.damaged:
                    changed = rounds.changed_for(found.record.shard, found.record.edition, position)
                    by_changes.setdefault(changed, []).append(position)
                for changed, positions in by_changes.items():
                    yield changed, found.record, tuple(positions)

    return _again(store, "repair", (), here, damaged, watch)


def _again(
    store: Store,
    kind: str,
    changed: tuple[str, ...],
    here: Sequence[str],
    find: Callable[[Job], Iterator[_Found]],
    watch: Watch,
) -> Outcome:
    """Begin a round of what ``find`` finds, one for each set of changes, and make it."""
    started = time.perf_counter()
    job = read_job(store)
    prepared = prepared_again(store, job, changed, here)
    _check_alone(store, job, changed)
    check_notify(prepared.spec.notify)
    with telling(prepared.spec, store), driving(prepared, watch) as (watch, check):
        last, outcomes = newest_round(store), list[Outcome]()
        if last is not None and not last.finished(Commits(store)):
            outcomes.append(finish(prepared, job, watch, check, started))
        rounds: dict[tuple[str, ...], dict[int, Again]] = {}
        edition, editions = last.edition if last else 1, dict[int, int]()
        for changes, record, positions in find(job):
            rounds.setdefault(changes, {})[record.shard] = Again(record.slice, record.edition, positions)
        for changes, shards in rounds.items():
            edition += 1
            shards = {
                number: replace(again, before=editions.get(number, again.before)) for number, again in shards.items()
            }
            editions |= dict.fromkeys(shards, edition)
            put_round(store, Round(edition, kind, changes, shards))
            outcomes.append(finish(prepared, job, watch, check, started))
        return _together(outcomes) if outcomes else finish(prepared, job, watch, check, started)


def _check_changeable(changes: Sequence[str], fields: Sequence[str], purpose: str) -> None:
    """Raise SpecError where a change is none of these fields'; those that end in a dot are whole sections."""
    for change in changes:
        if not change.startswith(tuple(fields)):
            told = ", ".join(f"{name}*" if name.endswith(".") else name for name in fields)
            raise SpecError("--set", [Problem(change, f"can't be changed for {purpose}", f"what can: {told}")])


def _together(outcomes: Sequence[Outcome]) -> Outcome:
    """How several rounds ended, one after the other: the last one's end, the work of all since the first was ready."""
    first, last = outcomes[0], outcomes[-1]
    return replace(
        last,
        starting_seconds=first.starting_seconds,
        making_seconds=last.starting_seconds + last.making_seconds - first.starting_seconds,
        images=sum(outcome.images for outcome in outcomes),
        batches=sum(outcome.batches for outcome in outcomes),
        deaths=sum(outcome.deaths for outcome in outcomes),
    )


def _check_alone(store: Store, job: Job, changed: Sequence[str]) -> None:
    """Raise UsageError where other settings would also make what is still to be made by those that stand."""
    planned = parse_spec(job.spec, "the output's job.yaml")
    last = newest_round(store)
    stopped = last is not None and last.changed != tuple(changed) and not last.finished(Commits(store))
    if (read_status(store).remaining or stopped) and overridden(planned, changed).deciding() != planned.deciding():
        raise UsageError(
            f"--set {' '.join(changed)}: the job has images still to make, which are planned otherwise; 'sdbatch run' "
            "makes them first, where too many fail with failures.max_failed_fraction=1"
        )


def prepared_again(store: Store, job: Job, changed: Sequence[str], here: Sequence[str]) -> Prepared:
    """The job as it was planned, but for the changes. ``here``: ``field=value`` that say where things lie now, and who
    does the work.

    Raises UsageError when its model is another one now, or when ``here`` says more than that.
    """
    planned = parse_spec(job.spec, "the output's job.yaml")
    made = overridden(planned, changed)
    _check_changeable(here, (*_HERE, *_PARTLY_HERE), "what is made as it was")
    spec = overridden(made, here)
    if spec.deciding() != made.deciding():
        raise UsageError(
            f"--set {' '.join(here)}: would make other pictures than were made; change nothing but where things lie"
        )
    spec = spec.model_copy(update={"output": spec.output.model_copy(update={"uri": store.uri})})
    try:
        prepared = prepare(spec)
    except (InputError, ModelError) as error:
        moved = "where it lies now is said by --set, as in --set input.uri=… or --set model.uri=…"
        raise type(error)(f"{error}; {moved}") from None
    if prepared.model.sha256 != job.model_sha256:
        raise UsageError(
            f"model.uri: {spec.model.uri} is another model than the job was planned with; name where that one lies now "
            "by --set model.uri=…"
        )
    for name, sha256 in prepared.checks.sha256.items():
        if sha256 != job.deciding.get("check_models", {}).get(name, sha256):
            raise UsageError(
                f"checks.{name}.model: is another model than the job was planned with; name where that one lies now "
                f"by --set checks.{name}.model=…"
            )
    if check_columns(spec.checks) != check_columns(planned.checks):
        raise UsageError(
            "checks: which checks there are, and which columns they fill in, is planned: change how strict they are, "
            "what happens to pictures that fail, or where models lie"
        )
    return prepared


def _quarantined(store: Store, job: Job, dropped: bool) -> Iterator[tuple[CommitRecord, tuple[int, ...]]]:
    """Records with quarantined requests that could be made, and the positions of these; ``dropped``: by checks, too."""
    shards = read_shards(store, job)
    makeable: Mapping[int, bool] = dict(zip(shards.column("number").tolist(), shards.column("makeable"), strict=True))
    records = (
        record
        for record in Commits(store).newest()
        if record.quarantined > (0 if dropped else record.dropped) and makeable[record.shard]
    )

    def positions(record: CommitRecord) -> tuple[int, ...]:
        rows = decode_metadata(store.get(record.metadata_key))
        errors = {position: row["error"] for position, row in enumerate(rows) if row["status"] == "quarantined"}
        return tuple(position for position, error in errors.items() if dropped or not error.startswith(DROPPED))

    with ThreadPoolExecutor(_READERS) as pool:
        several = list(records)
        yield from zip(several, pool.map(positions, several), strict=True)
