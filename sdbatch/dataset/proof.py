"""The proof of an export: what its records say is there, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable

from sdbatch.dataset.export import Manifest
from sdbatch.ledger import Commits, Opens, Read, Verdict, examine_shard
from sdbatch.storage import Store


def verify_export(
    store: Store, manifest: Manifest, read: Read, opens: Opens, progress: Callable[[int, int], None]
) -> Verdict:
    """Read all that was exported and compare it with what was recorded then. An export has no plan of its own: planned
    is what its records count."""
    records, verdict, named = list(Commits(store).newest()), Verdict(), set[str]()
    for done, record in enumerate(records, 1):
        found = examine_shard(store, record, manifest.sha256, None, read, opens)
        verdict.planned += record.committed
        verdict.committed += found.committed
        verdict.checked += found.committed
        verdict.missing += found.missing
        verdict.altered += found.altered
        named |= found.keys
        progress(done, len(records))
    unnamed = (entry.key for root in ("data/", "metadata/") for entry in store.list(root) if entry.key not in named)
    for key in unnamed:
        ours = re.match(r"(?:data|metadata)/(\d{7,})(?:r\d+)?[./]", key)
        (verdict.leftover if ours else verdict.extra).append(key)
    return verdict
