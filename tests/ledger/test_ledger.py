"""Commit records, status and verify on a real shard, without Ray and without a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdbatch.errors import OutputError, PlanChanged
from sdbatch.ledger import (
    Commits,
    Job,
    Part,
    Shards,
    failures,
    find_commit,
    read_job,
    read_shards,
    read_status,
    refuse_changes,
    write_job,
)
from sdbatch.outputs import read_pictures
from sdbatch.storage import LocalStore
from tests.ledger.planned import Planned


@pytest.fixture(params=["images", "webdataset", "parquet"])
def planned(request: pytest.FixtureRequest, tmp_path: Path) -> Planned:
    return Planned(LocalStore(tmp_path), request.param)


def test_status_goes_from_planned_to_complete(planned: Planned) -> None:
    assert read_status(planned.store).state == "planned"
    planned.commit(0)
    status = read_status(planned.store)
    assert (status.state, status.committed, status.remaining) == ("incomplete", 4, 6)
    for number in (1, 2, 3):
        planned.commit(number)
    status = read_status(planned.store)
    assert (status.state, status.planned, status.committed, status.quarantined) == ("complete", 10, 9, 1)
    assert failures(planned.store) == [{"shard": 3, "image_id": "00000003-0", "error": "row 4: the prompt is empty"}]


def test_verify_proves_a_complete_job(planned: Planned) -> None:
    for number in range(4):
        planned.commit(number)
    verdict = planned.verdict()
    assert verdict.ok
    assert (verdict.committed, verdict.quarantined, verdict.extra) == (9, 1, [])


def test_verify_names_what_is_missing_altered_and_extra(planned: Planned) -> None:
    for number in range(3):
        planned.commit(number)
    data = sorted(entry.key for entry in planned.store.list("data/"))
    rotten = planned.store.get(data[0])
    at = rotten.index(b"IDAT")
    planned.store.put(data[0], rotten[: at + 8] + bytes([rotten[at + 8] ^ 1]) + rotten[at + 9 :])
    planned.store.put("data/stray.png", b"x")
    planned.store.put("data/0000001/00009-stray.png", b"x")
    verdict = planned.verdict()
    assert not verdict.ok
    assert verdict.missing == ["00000003-0"]  # its shard has no record
    assert verdict.altered == ["00000000-0"]
    assert verdict.leftover == ["data/0000001/00009-stray.png"]
    assert verdict.extra == ["data/stray.png"]


def test_verify_notices_a_deleted_object_and_changed_metadata(planned: Planned) -> None:
    for number in range(4):
        planned.commit(number)
    planned.store.delete(next(iter(planned.store.list("data/"))).key)
    assert "00000000-0" in planned.verdict().missing
    planned.store.put("metadata/0000001.parquet", planned.store.get("metadata/0000002.parquet"))
    assert planned.verdict().altered == ["00000005-0", "00000006-0", "00000007-0", "00000008-0"]


def test_two_writers_leave_one_commit_that_matches_the_bytes(planned: Planned) -> None:
    """Even if their pictures differ, as those of two kinds of GPU may."""
    planned.commit(0, colour=0)
    record = find_commit(planned.store, planned.shards[0])
    planned.commit(0, colour=100)
    assert find_commit(planned.store, planned.shards[0]) == record
    for number in (1, 2, 3):
        planned.commit(number)
    assert planned.verdict().ok


def test_a_writer_that_dies_between_pictures_and_metadata_is_taken_over(planned: Planned) -> None:
    shard = planned.shards[0]
    pictures = [end.picture for end in planned.keep(shard, planned.ended(shard)) if end.picture is not None]
    planned.committer.writer.finish(shard.stem, pictures)
    assert planned.committer.finish_started(planned.shards[0]) is None
    planned.commit(0, colour=100)  # another machine, other bytes: those stored first stand
    for number in (1, 2, 3):
        planned.commit(number)
    verdict = planned.verdict()
    assert verdict.ok
    stored = read_pictures(planned.store, [path for path in _paths(planned) if "0000000" in path])
    assert {item.data for item in pictures} <= set(stored.values())


def test_a_writer_that_dies_between_metadata_and_commit_costs_nothing(planned: Planned) -> None:
    planned.commit(0)
    planned.store.delete("_sdbatch/commits/00000/0000000.json")
    record = planned.committer.finish_started(planned.shards[0])
    assert record is not None
    assert record.committed == 4
    assert [found.shard for found in Commits(planned.store).newest()] == [0]


def _paths(planned: Planned) -> list[str]:
    from sdbatch.outputs import decode_metadata

    return [row["path"] for row in decode_metadata(planned.store.get("metadata/0000000.parquet")) if row["path"]]


def test_the_plan_reads_back_and_the_first_planner_decides(tmp_path: Path) -> None:
    planned = Planned(LocalStore(tmp_path))
    assert list(read_shards(planned.store, planned.job)) == planned.shards
    other = Job({}, {}, [], "0" * 64, {}, (Part("0" * 64, 1, 1, 1, 1, 0),))
    assert write_job(planned.store, other, Shards.of(planned.shards)) == planned.job
    assert read_job(planned.store).fingerprint == planned.job.fingerprint


def test_changes_are_refused_with_the_difference(tmp_path: Path) -> None:
    planned = Planned(LocalStore(tmp_path))
    changed = planned.spec.deciding()
    changed["generate"]["seed"] = 8
    with pytest.raises(PlanChanged, match=r"generate\.seed: 0 → 8") as caught:
        refuse_changes(planned.job, changed, "0" * 64, ["input: x.csv changed (1 → 2 bytes)"], "out")
    assert "x.csv changed" in str(caught.value)
    assert "model: sha256 ffffffffffff… → 000000000000…" in str(caught.value)
    assert "choose another output.uri" in str(caught.value)
    refuse_changes(planned.job, planned.spec.deciding(), "f" * 64, [], "out")


def test_a_damaged_job_file_is_named(tmp_path: Path) -> None:
    store = Planned(LocalStore(tmp_path)).store
    store.put("_sdbatch/job.yaml", b"spec: [")
    with pytest.raises(OutputError, match=r"_sdbatch/job\.yaml is damaged"):
        read_status(store)


def test_an_output_without_a_job_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="holds no job"):
        read_status(LocalStore(tmp_path))
