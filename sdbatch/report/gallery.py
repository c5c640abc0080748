"""A page of pictures: one HTML file that opens from anywhere, for the pictures are inside."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import jinja2
import pyarrow.parquet as pq
from PIL import Image

from sdbatch.ledger import Commits, Job, read_job, read_status
from sdbatch.storage import Store

Read = Callable[[Store, Iterable[str]], dict[str, bytes]]

GALLERY_KEY = "gallery.html"
_THUMBNAIL = 256
_FORMATS = ("PNG", "JPEG", "WEBP")
_PARAMETERS = ("seed", "num_inference_steps", "guidance_scale", "sampler", "negative_prompt")


@dataclass(frozen=True)
class Gallery:
    """Where the page is and what it shows."""

    uri: str
    shown: int
    committed: int
    quarantined: int


def write_gallery(store: Store, read_pictures: Read, limit: int) -> Gallery:
    """Write the page of the first ``limit`` pictures; ``read_pictures`` finds pictures by their paths."""
    job, status, commits = read_job(store), read_status(store), Commits(store)
    rows = _rows(store, (record.metadata_key for record in commits.newest()))
    made = list(islice((row for row in rows if row["status"] == "committed"), limit))
    pictures = read_pictures(store, [row["path"] for row in made])
    sources = {path: source for path, data in pictures.items() if (source := _data_uri(data)) is not None}
    cards = [_card(row, sources[row["path"]], job) for row in made if row["path"] in sources]
    failures = list(islice((failure for record in commits.newest() for failure in record.failures), limit))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sdbatch.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("gallery.html.j2").render(
        status=status,
        cards=cards,
        failures=failures,
        failed=status.quarantined,
        model=made[0]["model"] if made else job.spec["model"]["uri"],
        job=job,
    )
    store.put(GALLERY_KEY, page.encode())
    return Gallery(f"{store.uri}/{GALLERY_KEY}", len(cards), status.committed, status.quarantined)


def _rows(store: Store, keys: Iterable[str]) -> Iterator[dict[str, Any]]:
    for key in keys:
        yield from pq.read_table(io.BytesIO(store.get(key))).to_pylist()


def _card(row: dict[str, Any], source: str, job: Job) -> dict[str, Any]:
    return {
        "row": row,
        "source": source,
        "parameters": {name: row[name] for name in _PARAMETERS if row[name] not in ("", None)},
        "kept": {name: row[name] for name in _kept(job) if row.get(name)},
    }


def _kept(job: Job) -> list[str]:
    """The user's columns, and what else the matrix varies."""
    varied = [name for name in job.spec.get("matrix", ()) if name not in _PARAMETERS]
    return [*job.spec["input"]["keep"], *varied]


def _data_uri(data: bytes) -> str | None:
    """The picture, made smaller if it is large, as a URI that holds it; None for what is no picture (any more)."""
    try:
        picture = Image.open(io.BytesIO(data), formats=_FORMATS)
        if max(picture.size) <= _THUMBNAIL:
            picture.verify()
            return f"data:image/{str(picture.format).lower()};base64," + base64.b64encode(data).decode()
        picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
        buffer = io.BytesIO()
        picture.convert("RGB").save(buffer, "JPEG", quality=85)
    except Exception:  # Pillow's readers raise whatever a damaged file makes them
        return None
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
