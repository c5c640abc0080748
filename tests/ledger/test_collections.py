"""Records collected slice by slice, the sums over them, and new editions of shards that are committed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sdbatch.engine.making.shards import Ended
from sdbatch.ledger import (
    Again,
    Commits,
    Round,
    collect,
    failures,
    find_commit,
    newest_round,
    put_commit,
    put_round,
    put_totals,
    read_status,
)
from sdbatch.outputs import decode_metadata
from sdbatch.storage import LocalStore
from tests.ledger.planned import Planned


@pytest.fixture(params=["images", "webdataset", "parquet"])
def planned(request: pytest.FixtureRequest, tmp_path: Path) -> Planned:
    return Planned(LocalStore(tmp_path), request.param, slices=2)


def singles(planned: Planned) -> list[str]:
    return [entry.key for entry in planned.store.list("_sdbatch/commits/")]


def collect_slice(planned: Planned, number: int) -> None:
    collect(planned.store, number, 1, [shard.number for shard in planned.shards if shard.slice == number])


def test_a_slice_is_collected_when_it_is_whole_and_not_before(planned: Planned) -> None:
    for number in range(3):
        planned.commit(number)
    collect_slice(planned, 0)
    assert len(singles(planned)) == 3
    planned.commit(3)
    planned.commit(4)
    before = list(Commits(planned.store).newest())
    collect_slice(planned, 0)
    collect_slice(planned, 0)  # twice is once
    assert singles(planned) == ["_sdbatch/commits/00001/0000004.json"]
    assert list(Commits(planned.store).newest()) == before
    assert [failure["image_id"] for failure in failures(planned.store)] == ["00000003-0"]


def test_a_status_is_the_same_however_far_records_are_collected(planned: Planned) -> None:
    for number in range(6):
        planned.commit(number)
    status = read_status(planned.store)
    assert (status.state, status.committed, status.quarantined, status.shards_committed) == ("incomplete", 17, 1, 6)
    collect_slice(planned, 0)
    assert read_status(planned.store) == status
    put_totals(planned.store)
    assert read_status(planned.store) == status
    for number in (6, 7):
        planned.commit(number)
    collect_slice(planned, 1)
    assert read_status(planned.store).state == "complete"  # the stored sums know the first slice only
    assert planned.verdict().ok


def test_a_record_that_turns_up_after_its_slice_was_collected_counts_once(planned: Planned) -> None:
    for number in range(4):
        planned.commit(number)
    late = find_commit(planned.store, planned.shards[1])
    assert late is not None
    collect_slice(planned, 0)
    status = read_status(planned.store)
    assert put_commit(planned.store, replace(late, writer="who was slow"))
    assert read_status(planned.store) == status
    assert [record.writer for record in Commits(planned.store).newest()] == ["w"] * 3 + ["w"]


def again(planned: Planned, number: int, positions: tuple[int, ...], edition: int = 2, colour: int = 0) -> None:
    """Make ``positions`` of a shard again, as a round's actor does."""
    record = Commits(planned.store).of_slice(planned.shards[number].slice)[number]
    put_round(planned.store, Round(edition, "retry", (), {number: Again(record.slice, record.edition, positions)}))
    shard, committer = replace(planned.shards[number], edition=edition), planned.a_committer()
    settled = committer.carried_over(shard)
    assert set(settled) == {position for position in range(shard.count) if position not in positions}
    made = planned.ended(shard, colour)
    kept = committer.writer.keep(
        shard.stem, [picture for position in positions if (picture := made[position].picture) is not None], last=False
    )
    for picture in kept:
        settled[picture.position] = Ended(made[picture.position].row, picture)
    committer.commit(shard, [end for _, end in sorted(settled.items())], {"model": 1.0}, "again")


@pytest.mark.parametrize("collected", [False, True])
def test_a_new_edition_has_what_was_missing_and_keeps_the_rest(planned: Planned, collected: bool) -> None:
    for number in range(8):
        planned.commit(number, failing=(2,) if number == 0 else ())
    if collected:
        collect_slice(planned, 0)
        put_totals(planned.store)
    before = read_status(planned.store)
    assert (before.committed, before.quarantined) == (17, 3)
    old = {row["image_id"]: row["sha256"] for row in decode_metadata(planned.store.get("metadata/0000000.parquet"))}
    again(planned, 0, (2,), colour=100)
    after = read_status(planned.store)
    assert (after.state, after.committed, after.quarantined) == ("complete", 18, 2)
    assert after.bytes > before.bytes
    verdict = planned.verdict()
    assert verdict.ok
    assert verdict.extra == []  # the first edition is gone
    rows = decode_metadata(planned.store.get("metadata/0000000r2.parquet"))
    assert [row["status"] for row in rows] == ["committed"] * 4
    assert {row["image_id"]: row["sha256"] for row in rows if old[row["image_id"]]} == {
        image_id: sha256 for image_id, sha256 in old.items() if sha256
    }
    again(planned, 0, (0, 1), edition=3, colour=100)
    assert read_status(planned.store).committed == 18
    assert planned.verdict().ok
    assert newest_round(planned.store) is not None


def test_a_damaged_picture_is_not_carried_over(planned: Planned) -> None:
    for number in range(8):
        planned.commit(number)
    rows = decode_metadata(planned.store.get("metadata/0000000.parquet"))
    key = rows[1]["path"].partition("#")[0]
    planned.store.put(key, planned.store.get(key)[:-1] + b"?") if "#" not in rows[1]["path"] else planned.store.put(
        key, b"garbage"
    )
    put_round(planned.store, Round(2, "repair", (), {0: Again(0, 1, (1,))}))
    settled = planned.a_committer().carried_over(replace(planned.shards[0], edition=2))
    assert 1 not in settled


def test_a_sample_reads_a_part_and_says_so(planned: Planned) -> None:
    for number in range(8):
        planned.commit(number)
    verdict = planned.verdict(sample=0.5)
    assert verdict.ok
    assert 0 < verdict.checked < verdict.planned == verdict.committed + verdict.quarantined


def test_a_picture_that_cannot_be_opened_is_altered_whatever_its_checksum_says(planned: Planned) -> None:
    from sdbatch.ledger import verify
    from sdbatch.outputs import read_stored

    for number in range(8):
        planned.commit(number)
    verdict = verify(planned.store, read_stored, lambda data: False, lambda done, total: None)
    assert len(verdict.altered) == 18
