"""The report: one page on a job, its progress, failures and scores, and every picture to look through.

    OUTPUT/report.html        the page; with all pictures inside where they are few
    OUTPUT/report/NAME.js     else rows and thumbnails, in files that the page asks for as it needs them

It opens from a disk as well as from a web server: what is beside it comes as scripts of data, which need no server.
The files' names are digests of what they hold: a report that is written again makes only what is new, and they go when
no page needs them. What is the user's comes as JSON and becomes text, never markup; the page's policy allows its own
script alone, by its digest.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from typing import Any

import jinja2
import pyarrow as pa

from sdbatch.ledger import CommitRecord, Commits, Job, read_job, read_progress, reason
from sdbatch.report.columns import OURS, PARAMETERS, distributions, filters, others, text
from sdbatch.report.thumbnails import Read, draw_packs, packs
from sdbatch.report.timeline import timeline
from sdbatch.storage import Store
from sdbatch.storage.parquet import read_parquet

PAGE_KEY = "report.html"
_BESIDE = "report/"
#: Up to so many images are inside the page, in larger thumbnails: pixels a side.
_MOST_INSIDE, _LARGE, _SMALL = 600, 256, 128
_ROWS_A_FILE = 5_000
_READERS = 16
_MOST_REASONS, _MOST_DEVICES = 100, 12

#: Called with how many images are done, and how many there are.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Report:
    """Where the page is, what it shows, and how large it and the files beside it are."""

    uri: str
    shown: int
    committed: int
    quarantined: int
    bytes: int
    files: int
    files_bytes: int


def write_report(store: Store, read_pictures: Read, limit: int, progress: Progress) -> Report:
    """Write the page, with the first ``limit`` images; ``read_pictures`` finds pictures by their paths."""
    job, found = read_job(store), read_progress(store)
    records = list(Commits(store).newest())
    table = _table(store, records, limit)
    inside = len(table) <= _MOST_INSIDE
    parts = _Inside() if inside else _Beside(store)
    side = _LARGE if inside else _SMALL
    summary = {
        "name": job.spec["name"],
        "output": store.uri,
        "state": found.status.state,
        "planned": found.status.planned,
        "committed": found.status.committed,
        "quarantined": found.status.quarantined,
        "bytes": found.status.bytes,
        "model_seconds": found.status.model_seconds,
        "images_per_second": found.images_per_second,
        "written": round(time.time()),
        "model": _model(table, job),
        "devices": _devices(records),
        "timeline": timeline(records),
        "reasons": sorted(found.reasons.items(), key=lambda pair: -pair[1])[:_MOST_REASONS],
        "filters": filters(table),
        "distributions": distributions(table),
        "others": others(table),
        "shown": len(table),
        "side": side,
        "rows": [[parts.add(content), count] for content, count in _row_files(table)],
        "packs": _add_packs(store, parts, table, read_pictures, side, progress),
    }
    page = _render(summary, parts.inside)
    store.put(PAGE_KEY, page)
    count, size = parts.tidy()
    return Report(
        f"{store.uri}/{PAGE_KEY}",
        len(table),
        found.status.committed,
        found.status.quarantined,
        len(page),
        count,
        size,
    )


class _Inside:
    """Data that stands in the page itself."""

    def __init__(self) -> None:
        self.inside: dict[str, str] = {}

    def has(self, name: str) -> bool:
        return name in self.inside

    def add(self, content: Any, name: str = "") -> str:
        packed = _json(content)
        name = name or hashlib.sha256(packed.encode()).hexdigest()[:16]
        self.inside[name] = packed
        return name

    def tidy(self) -> tuple[int, int]:
        """How many files are beside the page, and their bytes."""
        return 0, 0


class _Beside:
    """Data in files of their own: scripts that hand it to the page."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._there = {entry.key: entry.size for entry in store.list(_BESIDE)}
        self._used: dict[str, int] = {}
        self.inside: dict[str, str] = {}

    def has(self, name: str) -> bool:
        key = _key(name)
        if key in self._there:
            self._used[key] = self._there[key]
        return key in self._used

    def add(self, content: Any, name: str = "") -> str:
        packed = _json(content)
        name = name or hashlib.sha256(packed.encode()).hexdigest()[:16]
        if not self.has(name):
            data = f'arrived("{name}", {packed});\n'.encode()
            self._store.put(_key(name), data)
            self._used[_key(name)] = len(data)
        return name

    def tidy(self) -> tuple[int, int]:
        """Remove what only an earlier page needed."""
        for key in self._there.keys() - self._used.keys():
            self._store.delete(key)
        return len(self._used), sum(self._used.values())


def _key(name: str) -> str:
    return f"{_BESIDE}{name}.js"


def _table(store: Store, records: Sequence[CommitRecord], limit: int) -> pa.Table:
    """The first rows of the metadata, each with its position in its shard."""

    def read(record: CommitRecord) -> pa.Table:
        table = read_parquet(store.get(record.metadata_key))
        return table.append_column("position", pa.array(range(len(table)), pa.int32()))

    wanted, images = list[CommitRecord](), 0
    for record in records:
        if images >= limit:
            break
        wanted.append(record)
        images += record.committed + record.quarantined
    with ThreadPoolExecutor(_READERS) as pool:
        tables = list(pool.map(read, wanted))
    if not tables:
        return pa.table({name: pa.array([], pa.string()) for name in (*OURS, "position")})
    return pa.concat_tables(tables, promote_options="default").slice(0, limit).combine_chunks()


def _row_files(table: pa.Table) -> Iterator[tuple[str, int]]:
    """Rows for the page, some thousands at a time, column by column, compressed; and how many they are."""
    known = ("image_id", "shard", "position", *PARAMETERS, "path", "bytes", "status", "error")
    names = [name for name in known if name in table.column_names]  # an output of an earlier release may lack one
    for first in range(0, len(table), _ROWS_A_FILE):
        part = table.slice(first, _ROWS_A_FILE)
        columns = {name: [text(cell) for cell in part.column(name).to_pylist()] for name in names}
        kept = {name: [text(cell) for cell in part.column(name).to_pylist()] for name in others(part)}
        columns["reason"] = [reason(error) if error else "" for error in columns["error"]]
        content = _json({"columns": _short(columns), "others": _short(kept)}).encode()
        yield base64.b64encode(gzip.compress(content, mtime=0)).decode(), len(part)


def _short(columns: dict[str, list[str]]) -> list[list[Any]]:
    """Names and cells; one cell stands for a column that has no other. Pairs, for names are anything at all."""
    return [[name, cells[:1] if len(set(cells)) == 1 else cells] for name, cells in columns.items()]


def _add_packs(
    store: Store, parts: _Inside | _Beside, table: pa.Table, read_pictures: Read, side: int, progress: Progress
) -> list[list[Any]]:
    """Make the thumbnails that are not there yet; returns names and numbers of rows, in the order of the rows."""
    added, done = list[list[Any]](), 0
    rows = table.select(["shard", "path", "sha256"])
    for together in packs(_shards(rows), side):
        missing = [pack for pack in together if not parts.has(pack.name)]
        for name, small in draw_packs(store, missing, read_pictures, side).items():
            parts.add(small, name)
        for pack in together:
            added.append([pack.name, len(pack.rows)])
            done += len(pack.rows)
        progress(done, len(table))
    return added


def _shards(rows: pa.Table) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(rows), _ROWS_A_FILE):
        for _, shard in groupby(rows.slice(start, _ROWS_A_FILE).to_pylist(), key=lambda row: row["shard"]):
            yield list(shard)


def _model(table: pa.Table, job: Job) -> str:
    return str(table.column("model")[0].as_py()) if len(table) else job.model_name


def _devices(records: Sequence[CommitRecord]) -> list[list[Any]]:
    """What made the pictures, and how many."""
    counts = Counter[str]()
    for record in records:
        if record.seconds:
            told = ", ".join(f"{name} {value}" for name, value in sorted(record.environment.items()))
            counts[told] += record.committed
    return [[told, count] for told, count in counts.most_common(_MOST_DEVICES)]


def _json(content: Any) -> str:
    """JSON that stays what it is inside a script element and as a script: ASCII, and nothing that looks like markup."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c").replace(">", "\\u003e")


def _render(summary: dict[str, Any], inside: dict[str, str]) -> bytes:
    templates = files("sdbatch.report") / "templates"
    script, style = ((templates / name).read_text(encoding="utf-8") for name in ("report.js", "report.css"))
    environment = jinja2.Environment(loader=jinja2.PackageLoader("sdbatch.report"), autoescape=True, trim_blocks=True)
    # What an allowed script asks for is allowed ('strict-dynamic'), which a page with all data inside has no need of.
    scripts = _digest(script) + ("" if inside else " 'strict-dynamic'")
    return (
        environment.get_template("report.html.j2")
        .render(
            summary=summary,
            data=_json(summary),
            inside=inside,
            script=script,
            style=style,
            policy=f"default-src 'none'; script-src {scripts}; style-src {_digest(style)}; "
            "img-src 'self' file: data:; base-uri 'none'; form-action 'none'",
        )
        .encode()
    )


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
