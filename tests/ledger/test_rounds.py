"""Rounds: what is made again, and by which settings."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from sdbatch.ledger import Again, Round, Rounds, put_round
from sdbatch.storage import LocalStore


def test_who_asks_by_which_settings_many_pictures_were_made_reads_each_round_once(tmp_path: Path) -> None:
    reads = Counter[str]()

    class Counting(LocalStore):
        def get(self, key: str) -> bytes:
            reads[key] += 1
            return super().get(key)

    store = Counting(tmp_path)
    put_round(store, Round(2, "retry", ("model.dtype=float16",), {7: Again(0, 1, (3, 5))}))
    put_round(store, Round(3, "repair", (), {7: Again(0, 2, (5,))}))
    rounds = Rounds(store)
    told = [rounds.changed_for(7, 3, position) for position in range(6)]
    assert told == [(), (), (), ("model.dtype=float16",), (), ()]
    assert rounds.changed_for(7, 2, 5) == ("model.dtype=float16",)
    assert reads == {"_sdbatch/rounds/2.json": 1, "_sdbatch/rounds/3.json": 1}
