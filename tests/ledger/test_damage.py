"""Whatever is done to a stored object, verify finds it, in words, and leftovers of shards that are done."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sdbatch.errors import SdbatchError, StorageError
from sdbatch.ledger import (
    Again,
    Commits,
    Round,
    collect,
    failures,
    find_commit,
    put_round,
    put_totals,
    read_collected,
    read_shards,
    read_slice,
    read_status,
)
from sdbatch.ledger.commits import commit_key
from sdbatch.outputs import decode_metadata
from sdbatch.storage import LocalStore
from tests.ledger.planned import Planned

Damage = Callable[[bytes, random.Random], bytes | None]


def cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def flip(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]


def blank(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data))
    return data[:at] + bytes(len(data[at : at + 512])) + data[at + 512 :]


def remove(data: bytes, chance: random.Random) -> None:
    return None


@pytest.fixture(params=["images", "webdataset", "parquet"])
def planned(request: pytest.FixtureRequest, tmp_path: Path) -> Planned:
    """A job that is done, the records of its first slice collected."""
    planned = Planned(LocalStore(tmp_path), request.param, slices=2)
    for number in range(8):
        planned.commit(number, failing=(1,) if number == 0 else ())
    collect(planned.store, 0, 1, [0, 1, 2, 3])
    put_totals(planned.store)
    assert planned.verdict().ok
    return planned


def damage(planned: Planned, key: str, how: Damage, chance: random.Random) -> bool:
    """False if it came out as it was."""
    data = planned.store.get(key)
    changed = how(data, chance)
    if changed is None:
        planned.store.delete(key)
    else:
        planned.store.put(key, changed)
    return changed != data


def found(planned: Planned) -> bool:
    """Does verify say that something is wrong? Nothing but errors of ours may come of any command."""
    for look in (read_status, failures):
        with contextlib.suppress(SdbatchError):
            look(planned.store)
    try:
        return not planned.verdict().ok
    except SdbatchError:
        return True


def test_no_damage_to_pictures_or_metadata_goes_unnoticed(planned: Planned) -> None:
    chance = random.Random(5)
    for entry in [*list(planned.store.list("data/"))[::4], *list(planned.store.list("metadata/"))[::3]]:
        whole = planned.store.get(entry.key)
        for how in (cut, flip, flip, blank, remove):
            assert not damage(planned, entry.key, how, chance) or found(planned), (entry.key, how.__name__)
            planned.store.put(entry.key, whole)


def test_no_damage_to_plan_or_records_changes_what_they_say(planned: Planned) -> None:
    """It is noticed, or hits what nobody reads, such as statistics and times."""
    chance = random.Random(6)

    def content() -> object:
        slices = [read_slice(planned.store, planned.job, number).to_pylist() for number in (0, 1)]
        records = [(record.committed, record.metadata_sha256) for record in Commits(planned.store).newest()]
        return slices, list(read_shards(planned.store, planned.job)), records

    told = content()
    for prefix in ("_sdbatch/plan/", "_sdbatch/commits/", "_sdbatch/committed/"):
        for entry in [entry for entry in planned.store.list(prefix) if not entry.key.endswith("totals.json")]:
            whole = planned.store.get(entry.key)
            for how in (cut, flip, flip, blank, remove):
                if damage(planned, entry.key, how, chance) and not found(planned):
                    assert content() == told, (entry.key, how.__name__)
                planned.store.put(entry.key, whole)


def test_what_lies_beside_pictures_is_told_by_its_own_name(tmp_path: Path) -> None:
    planned = Planned(LocalStore(tmp_path), "images")
    for number in range(4):
        planned.commit(number)
    gone, other = "data/0000000/metadata.parquet", "data/0000001/metadata.parquet"
    planned.store.delete(gone)
    planned.store.put(other, planned.store.get(other) + b"x")
    verdict = planned.verdict()
    assert (verdict.missing, verdict.altered, verdict.committed) == ([gone], [other], 9)
    assert not verdict.ok


def test_swapped_pictures_are_altered(planned: Planned) -> None:
    first, *_, last = (entry.key for entry in planned.store.list("data/"))
    one, other = planned.store.get(first), planned.store.get(last)
    planned.store.put(first, other)
    planned.store.put(last, one)
    verdict = planned.verdict()
    assert not verdict.ok
    assert "00000000-0" in verdict.altered + verdict.missing


def test_a_row_that_is_there_twice_is_doubled_even_if_the_record_agrees(planned: Planned) -> None:
    record = find_commit(planned.store, planned.shards[4])
    assert record is not None
    table = pq.read_table(io.BytesIO(planned.store.get(record.metadata_key)))
    buffer = io.BytesIO()
    pq.write_table(table.take([0, 1, 1, 3]), buffer)
    planned.store.put(record.metadata_key, buffer.getvalue())
    wrong = replace(record, metadata_sha256=hashlib.sha256(buffer.getvalue()).hexdigest())
    planned.store.put(commit_key(4, 1), json.dumps(asdict(wrong)).encode())
    verdict = planned.verdict()
    assert verdict.doubled == ["00000011-0"]
    assert verdict.missing == ["00000012-0"]


@pytest.mark.parametrize("change", [{"committed": 3}, {"quarantined": 1}, {"bytes": 1}, {"failures": [{}]}])
def test_a_record_that_counts_wrongly_is_noticed(planned: Planned, change: dict[str, object]) -> None:
    record = find_commit(planned.store, planned.shards[4])
    assert record is not None
    planned.store.put(commit_key(4, 1), json.dumps(asdict(record) | change).encode())
    assert len(planned.verdict().altered) == 4


def test_sums_that_are_wrong_are_noticed_and_those_of_what_is_gone_not_believed(planned: Planned) -> None:
    key = "_sdbatch/committed/totals.json"
    sums = json.loads(planned.store.get(key))
    planned.store.put(key, json.dumps(sums | {"committed": sums["committed"] + 1}).encode())
    with pytest.raises(StorageError, match=r"totals\.json is damaged: .*; remove it"):
        planned.verdict()
    planned.store.put(key, json.dumps(sums).encode())
    records = read_collected(planned.store, 0, 1)
    planned.store.delete("_sdbatch/committed/00000.parquet")
    assert read_status(planned.store).shards_committed == 4
    for record in records:  # found again from the metadata
        assert planned.committer.finish_started(planned.shards[record.shard]) is not None
    assert planned.verdict().ok
    assert read_status(planned.store).shards_committed == 8


def test_what_is_left_over_of_an_edition_is_told_and_what_is_in_work_is_not(planned: Planned) -> None:
    old = {entry.key: planned.store.get(entry.key) for entry in planned.store.list("") if "/0000004" in entry.key}
    put_round(planned.store, Round(2, "retry", (), {4: Again(1, 1, (0,))}))
    shard, committer = replace(planned.shards[4], edition=2), planned.a_committer()
    settled = committer.carried_over(shard)
    assert planned.verdict().ok  # carried over, and not committed yet
    made = planned.ended(shard, colour=90)
    kept = committer.writer.keep(shard.stem, [made[0].picture] if made[0].picture else [], last=False)
    settled[0] = replace(made[0], picture=kept[0])
    committer.commit(shard, [end for _, end in sorted(settled.items())], {}, "w")
    assert planned.verdict().ok
    for key, data in old.items():  # its writer died before they were gone, or somebody's wrote them once more
        planned.store.put(key, data)
    verdict = planned.verdict()
    assert not verdict.ok
    assert verdict.leftover == [key for key in old if not key.startswith("_sdbatch/")]
    planned.store.put("data/notes.txt", b"x")
    assert planned.verdict().extra == ["data/notes.txt"]


def test_a_picture_that_another_writer_stored_is_not_quarantined(tmp_path: Path) -> None:
    """One made it and died; the next can't make it, and finds it in the object that stands."""
    planned = Planned(LocalStore(tmp_path), "webdataset")
    shard = planned.shards[0]
    planned.committer.writer.finish(shard.stem, [end.picture for end in planned.ended(shard) if end.picture])
    planned.commit(0, colour=50, failing=(1,))
    rows = decode_metadata(planned.store.get("metadata/0000000.parquet"))
    assert [(row["status"], row["error"]) for row in rows] == [("committed", None)] * 4
