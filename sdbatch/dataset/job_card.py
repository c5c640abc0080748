"""The card of a job's output, from its ledger: a few objects, however large the job."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq

from sdbatch.dataset.card import Card, write_card
from sdbatch.ledger import Commits, Job, Shards, read_shards, read_totals
from sdbatch.outputs import copies
from sdbatch.spec import JobSpec
from sdbatch.storage import Store

_MOST_SHOWN = 8


def write_job_card(store: Store, job: Job, spec: JobSpec) -> bool:
    """Write the card of a job that is done; False where somebody else's stands, which stays."""
    totals, shards = read_totals(store), read_shards(store, job)
    return write_card(
        store,
        Card(
            name=spec.name,
            license=spec.output.license,
            format=spec.output.format,
            ending=spec.output.image.type,
            images=totals.committed,
            bytes=totals.bytes,
            model=job.model_name,
            model_sha256=job.model_sha256,
            columns=metadata_schema(store),
            kept=tuple(spec.kept),
            facts={**settings(shards.makeable()), **_versions(job)},
            counts={
                "requests that could not be made": totals.quarantined - totals.dropped,
                **({"pictures that checks dropped": totals.dropped} if totals.dropped else {}),
            },
            copies={several.root: (several.told, several.form.type) for several in copies(spec.output)},
        ),
    )


def metadata_schema(store: Store) -> pa.Schema:
    """The columns of the metadata table."""
    for record in Commits(store).newest():
        return pq.read_schema(io.BytesIO(store.get(record.metadata_key)))
    return pa.schema([])


def settings(shards: Shards) -> dict[str, str]:
    """What the pictures were planned with, most of them first."""
    told = {
        "size": [(f"{width}x{height}", count) for width, height, count in shards.counted("width", "height")],
        "sampler": shards.counted("sampler"),
        "steps": shards.counted("num_inference_steps"),
    }
    return {name: _most([(str(value), count) for value, count in found]) for name, found in told.items() if found}


def _most(found: list[tuple[str, int]]) -> str:
    ordered = sorted(found, key=lambda pair: (-pair[1], pair[0]))
    if len(ordered) == 1:
        return ordered[0][0]
    shown = ", ".join(f"{value} ({count:,})" for value, count in ordered[:_MOST_SHOWN])
    return shown + (f" and {len(ordered) - _MOST_SHOWN:,} more" if len(ordered) > _MOST_SHOWN else "")


def _versions(job: Job) -> dict[str, str]:
    told = ", ".join(f"{name} {version}" for name, version in job.versions.items())
    return {"planned by": told, "fingerprint": f"`{job.fingerprint}`"}
