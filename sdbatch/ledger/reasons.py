"""Why requests were quarantined, in kinds: messages that differ in numbers, names and paths alone are one reason."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

#: What the error of a request begins with whose picture was made, checked and dropped.
DROPPED = "check: "
_MOST_CHARACTERS = 160
#: Reasons that sums tell apart; what is rarer than all of these goes under OTHERS.
_MOST = 50
OTHERS = "other reasons"


def reason(error: str) -> str:
    """What a message says of every request that fails in the same way."""
    words = " ".join(error.split())
    words = re.sub(r"^row [0-9,]+: ", "", words)
    words = re.sub(r"'[^']*'", "'…'", words)
    words = re.sub(r"[^\s'(]*/[^\s':;,)]*", "…", words)
    words = re.sub(r"(?<![A-Za-z0-9])[-+]?[0-9][0-9,.]*(?:e[-+]?[0-9]+)?(?![A-Za-z])", "N", words)
    return words if len(words) <= _MOST_CHARACTERS else f"{words[:_MOST_CHARACTERS]}…"


def count_reasons(failures: Iterable[Mapping[str, str]]) -> dict[str, int]:
    """Reason → how many of the failures have it."""
    return dict(Counter(reason(failure["error"]) for failure in failures))


def summed(sums: Mapping[str, int], more: Mapping[str, int], less: Mapping[str, int]) -> dict[str, int]:
    """Sums of reasons with ``more`` added and ``less`` taken away; what there are too many kinds of is OTHERS."""
    found = Counter(sums)
    found.update(more)
    for name, count in less.items():
        found[name if found[name] >= count else OTHERS] -= count
    kinds = [(name, count) for name, count in found.most_common() if count > 0 and name != OTHERS]
    kept = dict(kinds[:_MOST])
    others = found[OTHERS] + sum(count for _, count in kinds[_MOST:])
    return kept | ({OTHERS: others} if others > 0 else {})
