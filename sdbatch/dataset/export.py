"""A job's pictures in another form, without making any: read shard by shard, stored anew elsewhere.

    TARGET/_sdbatch/export.json         what is exported, and how; written first: another export goes elsewhere
    TARGET/_sdbatch/commits/…           a record a shard, written last, as a job writes them

The same command goes on where it was stopped, and takes what the job has made or mended since.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from sdbatch import __version__
from sdbatch.dataset.card import Card, code, write_card
from sdbatch.dataset.exporter import Exporter
from sdbatch.dataset.job_card import settings
from sdbatch.dataset.manifest import Manifest, read_manifest, take
from sdbatch.errors import OutputError, UsageError
from sdbatch.ledger import Commits, Job, read_job, read_shards, read_status, read_totals
from sdbatch.outputs import Copies, Signer, copies
from sdbatch.spec import JobSpec, Picture, parse_spec
from sdbatch.storage import Store

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Exported:
    """How an export ended. ``unmade``: pictures that the job has still to make."""

    target: str
    images: int
    bytes: int
    left_out: int
    unmade: int
    left_behind: Sequence[str]  # folders of renditions and thumbnails that the job has
    unsigned: str | None  # why what is encoded anew has no signatures, where the job's own has


def export(
    source: Store,
    target: Store,
    form: str | None,
    image: Picture | None,
    where: str | None,
    renditions: bool,
    progress: Progress,
) -> Exported:
    """Store the committed pictures of a job in ``target``; a ``form`` or ``image`` of None is the job's own.

    With ``renditions`` also the job's renditions and thumbnails, made of the pictures as they are exported.

    Raises OutputError where the target holds something else, UsageError for a condition that says nothing.
    """
    job = read_job(source)
    spec = parse_spec(job.spec, "the output's job.yaml")
    if renditions and not spec.output.copied_to:
        raise UsageError("--renditions: the job has neither renditions nor thumbnails; leave it out")
    anew = image is not None or renditions
    signer, unsigned = _signer(spec, target) if anew else (None, None)
    manifest = Manifest(
        spec.name,
        job.parts[0].fingerprint,
        form or spec.output.format,
        None if image is None else image.model_dump(mode="json"),
        where,
        renditions,
        signer is not None,
    )
    records = Commits(source)
    first = next(records.newest(), None)
    if first is None:
        raise UsageError(f"{source.uri}: nothing of this job is made yet; 'sdbatch run' makes it")
    schema = pq.read_schema(io.BytesIO(source.get(first.metadata_key)))
    condition = manifest.condition
    for column in sorted(condition.columns if condition else ()):
        if column not in schema.names:
            raise UsageError(f"--where: there is no column {column!r}; there is: {', '.join(schema.names)}")
    take(target, manifest)
    asked = copies(spec.output.model_copy(update={"image": image or spec.output.image})) if renditions else []
    exporter = Exporter(source, target, job, spec, manifest, asked, signer)
    status = read_status(source)
    for done, _ in enumerate(exporter.all(records), 1):
        progress(done, status.shards_committed)
    totals = read_totals(target)
    left_out, behind = status.committed - totals.committed, [] if renditions else spec.output.copied_to
    ended = Exported(target.uri, totals.committed, totals.bytes, left_out, status.remaining, behind, unsigned)
    _write_card(source, target, job, spec, manifest, asked, schema, ended)
    return ended


def _signer(spec: JobSpec, target: Store) -> tuple[Signer | None, str | None]:
    """Who signs what is encoded anew, if the job's pictures are signed; if nobody does, why.

    An export goes on as it was begun, with signatures or without.
    """
    if spec.output.c2pa is None:
        return None, None
    standing = read_manifest(target)
    if standing is not None and not standing.signed:
        return None, "the export was begun without them; to have them, export to an empty place"
    try:
        return Signer(spec.output.c2pa, __version__), None
    except OutputError as error:
        if standing is not None:
            raise OutputError(f"TARGET: {target.uri} holds an export that is signed, and {error}") from None
        return None, str(error)


def _write_card(
    source: Store,
    target: Store,
    job: Job,
    spec: JobSpec,
    manifest: Manifest,
    asked: list[Copies],
    schema: pa.Schema,
    ended: Exported,
) -> None:
    facts = {"exported from": code(source.uri), "fingerprint": code(job.fingerprint)}
    if manifest.where is not None:
        facts["chosen by"] = code(manifest.where)
    write_card(
        target,
        Card(
            name=spec.name,
            license=spec.output.license,
            format=manifest.format,
            ending=(manifest.picture or spec.output.image).type,
            images=ended.images,
            bytes=ended.bytes,
            model=job.model_name,
            model_sha256=job.model_sha256,
            columns=schema,
            kept=tuple(spec.kept),
            facts={**settings(read_shards(source, job).makeable()), **facts},
            counts={"pictures of the job that are left out": ended.left_out},
            copies={several.root: (several.told, several.form.type) for several in asked},
        ),
    )
