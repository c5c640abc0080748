"""The proof of an export: what its records say is there, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from sdbatch.dataset.manifest import Manifest
from sdbatch.ledger import CommitRecord, Commits, Findings, Opens, Read, Verdict, examine_shard
from sdbatch.storage import Store

#: Shards that are read at once, and those whose findings may wait for their turn.
_CHECKERS, _AHEAD = 8, 64
#: How keys of shards begin, whatever their edition.
_OURS = re.compile(r"(?:data|metadata|thumbnails|renditions/[^/]+)/\d{7,}(?:r\d+)?[./]")


def verify_export(
    store: Store, manifest: Manifest, read: Read, opens: Opens, progress: Callable[[int, int], None]
) -> Verdict:
    """Read all that was exported and compare it with what was recorded then. An export has no plan of its own: planned
    is what its records count."""
    records, verdict, named = list(Commits(store).newest()), Verdict(), set[str]()

    def check(record: CommitRecord) -> Findings:
        return examine_shard(store, record, manifest.sha256, None, read, opens)

    with ThreadPoolExecutor(_CHECKERS) as pool:
        for first in range(0, len(records), _AHEAD):
            some = records[first : first + _AHEAD]
            for done, (record, found) in enumerate(zip(some, pool.map(check, some), strict=True), first + 1):
                verdict.planned += record.committed
                verdict.committed += found.committed
                verdict.checked += found.committed
                verdict.missing += found.missing
                verdict.altered += found.altered
                named |= found.keys
                progress(done, len(records))
    unnamed = (entry.key for root in manifest.roots for entry in store.list(root) if entry.key not in named)
    for key in unnamed:
        (verdict.leftover if _OURS.match(key) else verdict.extra).append(key)
    return verdict
