"""A generator with checks, without Ray: what it keeps and drops, and that an interruption changes no byte of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset

from sdbatch.checks import candidate_seed
from sdbatch.dataset import write_job_card
from sdbatch.engine.making.batch import Refused, Result
from sdbatch.engine.making.generator import looks_of
from sdbatch.engine.models.image_model import DrawnAtOnce
from sdbatch.errors import ModelError
from sdbatch.ledger import DROPPED, Again, Round, find_commit, put_round, verify
from sdbatch.outputs import check_columns, decode_metadata, opens, read_stored
from sdbatch.prompts import ImageRequest
from tests.conftest import CommandLine
from tests.engine.test_generator import Planned

CLIP = {"model": "builtin:shapes-clip"}
#: Limits that some coloured blocks pass and others don't.
EVERYTHING = {
    "on_fail": "reroll",
    "rerolls": 2,
    "best_of": 2,
    "clip_score": {**CLIP, "min": 0.3},
    "blank": {"min_contrast": 70.0, "on_fail": "tag"},
    "near_duplicates": {"max_distance": 20},
    "safety": {**CLIP, "concepts": {"a blue star": -0.28}, "on_fail": "drop"},
}


def planned(root: Path, checks: Mapping[str, Any], form: str = "images", **sections: Any) -> Planned:
    return Planned(root, form, sections={"model": {"uri": "builtin:null"}, "checks": checks, **sections})


def rows(job: Planned) -> list[dict[str, Any]]:
    return decode_metadata(job.store.get("metadata/0000000.parquet"))


def objects(job: Planned) -> dict[str, bytes]:
    return {entry.key: job.store.get(entry.key) for top in ("data/", "metadata/") for entry in job.store.list(top)}


@pytest.mark.parametrize("form", ["images", "webdataset", "parquet"])
def test_a_checked_shard_comes_out_the_same_wherever_its_maker_ends(form: str, tmp_path: Path) -> None:
    whole = planned(tmp_path / "whole", EVERYTHING, form)
    receipt = whole.generator().run_shard(whole.shard)
    assert receipt.committed + receipt.quarantined == 7
    assert receipt.failed_making == 0  # what is dropped is no failure
    assert {row["rerolls"] for row in rows(whole)} >= {0, 2}
    for batches in (1, 2):
        job = planned(tmp_path / str(batches), EVERYTHING, form)
        begun = job.generator()
        choose, calls = begun._choose, list[int]()

        def stop(*given: Any, begun: Any = begun, choose: Any = choose, calls: Any = calls, last: int = batches) -> Any:
            calls.append(1)
            if len(calls) == last:
                begun.halt()
            return choose(*given)

        begun._choose = stop  # type: ignore[method-assign]
        assert begun.run_shard(job.shard) is None
        if form == "images":  # of a batch some pictures were stored before it ended, and others not
            job.store.delete(next(entry.key for entry in job.store.list("data/")))
        job.generator().run_shard(job.shard)
        assert objects(job) == objects(whole)
        assert verify(job.store, read_stored, opens, lambda done, total: None).ok


def test_a_picture_made_again_has_the_same_bytes(tmp_path: Path) -> None:
    job = planned(tmp_path, EVERYTHING)
    job.generator().run_shard(job.shard)
    found = rows(job)
    looks = looks_of(dict(enumerate(found)))
    for position, row in enumerate(found):
        data = job.generator().made_again(job.shard, [position], looks)[position]
        assert data == (None if row["path"] is None else job.store.get(row["path"]))


def test_every_seed_and_score_that_was_tried_is_recorded(tmp_path: Path) -> None:
    job = planned(tmp_path, EVERYTHING)
    receipt = job.generator().run_shard(job.shard)
    assert receipt.batches > 2 * 3  # two candidates of each of three batches, and new seeds
    for row, request in zip(rows(job), job.requests, strict=True):
        assert row["seeds_tried"] == [candidate_seed(request.seed, number) for number in range(2 + row["rerolls"])]
        assert row["seed"] in row["seeds_tried"]
        place = row["seeds_tried"].index(row["seed"])
        assert row["scores_tried"][place] == row["clip_score"]
        assert row["failed_tried"][place] == row["failed_checks"]
        if row["rerolls"] < 2:  # a candidate passed, or what it fails asks for no new seed
            assert "clip_score" not in row["failed_checks"]
        assert (row["status"] == "quarantined") == ("safety" in row["failed_checks"])


def test_the_best_of_several_is_kept_and_no_neighbour_matters(tmp_path: Path) -> None:
    job = planned(tmp_path / "a", {"best_of": 3, "clip_score": CLIP})
    job.generator().run_shard(job.shard)
    for row in rows(job):
        assert row["clip_score"] == max(row["scores_tried"])
        assert (len(row["scores_tried"]), row["failed_checks"]) == (3, "")
    generator = job.generator()
    alone = [generator.made_again(job.shard, [position], {})[position] for position in range(7)]
    assert alone == [job.store.get(row["path"]) for row in rows(job)]


def test_what_is_dropped_is_accounted_for(tmp_path: Path) -> None:
    job = planned(tmp_path, {"on_fail": "drop", "clip_score": {**CLIP, "min": 0.26}}, "webdataset")
    receipt = job.generator().run_shard(job.shard)
    found = rows(job)
    gone = [row for row in found if row["failed_checks"]]
    assert 0 < len(gone) == receipt.quarantined < 7
    for row in gone:
        assert row["error"] == f"{DROPPED}clip_score is {row['clip_score']}, below 0.26"
        assert (row["status"], row["path"], row["seed"]) == ("quarantined", None, job.requests[found.index(row)].seed)
    record = find_commit(job.store, job.shard)
    assert record is not None
    assert (record.dropped, record.seconds["checks"] > 0) == (len(gone), True)
    assert verify(job.store, read_stored, opens, lambda done, total: None).ok


@pytest.mark.parametrize("form", ["images", "webdataset", "parquet"])
def test_rows_tell_of_the_pictures_that_stand_also_if_another_writer_judged(form: str, tmp_path: Path) -> None:
    job = planned(tmp_path, EVERYTHING, form)
    first, second = job.generator(), job.generator()
    others = [dataclasses.replace(request, seed=request.seed + 1) for request in job.requests]
    first._requests = lambda shard: others  # type: ignore[method-assign]
    first.run_shard(job.shard)
    before = rows(job)
    for prefix in ("metadata/", "_sdbatch/commits/"):
        for entry in list(job.store.list(prefix)):
            job.store.delete(entry.key)
    second._committer.writer.kept = lambda stem: {}  # type: ignore[method-assign]
    second.run_shard(job.shard)
    names = ("sha256", "seed", *check_columns(job.spec.checks))
    theirs, ours = (
        {row["image_id"]: row for row in found if row["status"] == "committed"} for found in (before, rows(job))
    )
    assert len(ours) > 2
    for image_id, row in ours.items():
        assert [row[name] for name in names] == [theirs[image_id][name] for name in names]


def test_near_duplicates_are_found_among_those_before_in_the_shard(tmp_path: Path) -> None:
    job = planned(tmp_path, {"near_duplicates": {"max_distance": 0}})
    generator = job.generator()
    same = [dataclasses.replace(request, seed=5) for request in job.requests[:3]]
    generator._requests = lambda shard: [*same, *job.requests[3:]]  # type: ignore[method-assign]
    generator.run_shard(job.shard)
    found = rows(job)
    assert [row["duplicate_of"] for row in found] == [None, found[0]["image_id"], found[0]["image_id"], *[None] * 4]
    assert [row["failed_checks"] for row in found[:2]] == ["", "near_duplicates"]
    assert {row["status"] for row in found} == {"committed"}


def test_a_picture_is_never_compared_with_one_that_a_retry_made_later(tmp_path: Path) -> None:
    job = planned(tmp_path, {"on_fail": "drop", "near_duplicates": {"max_distance": 0}})
    twins = [dataclasses.replace(request, seed=5) for request in job.requests[:2]]

    def run(edition: int) -> list[dict[str, Any]]:
        generator = job.generator()
        generator._requests = lambda shard: [*twins, *job.requests[2:]]  # type: ignore[method-assign]
        make, failed = generator._maker.make, {0: Refused("init_image: is not there yet")}
        if edition == 1:
            generator._maker.make = lambda first, batch: {**make(first, batch), **(failed if 0 in batch else {})}  # type: ignore[method-assign]
        shard = dataclasses.replace(job.shard, edition=edition)
        generator.run_shard(shard)
        found = decode_metadata(job.store.get(f"metadata/{shard.stem}.parquet"))
        again = generator.checksums(shard, [1], looks_of(dict(enumerate(found))))
        assert again == {1: found[1]["sha256"]}
        return found

    first = run(1)
    assert [row["status"] for row in first[:2]] == ["quarantined", "committed"]
    put_round(job.store, Round(2, "retry", (), {0: Again(0, 1, (0,))}))
    assert [row["status"] for row in run(2)[:2]] == ["committed", "committed"]
    put_round(job.store, Round(3, "repair", (), {0: Again(0, 2, (1,))}))
    assert run(3)[1]["sha256"] == first[1]["sha256"]


def test_near_duplicates_are_listed_over_the_whole_job(tmp_path: Path) -> None:
    job = planned(tmp_path, {"near_duplicates": {"max_distance": 2}})
    generator = job.generator()
    twins = [dataclasses.replace(request, seed=5) for request in job.requests[2:4]]
    generator._requests = lambda shard: [*job.requests[:2], *twins, *job.requests[4:]]  # type: ignore[method-assign]
    generator.run_shard(job.shard)
    told = CommandLine(tmp_path).json("duplicates", tmp_path)
    ids = [request.image_id for request in job.requests]
    assert told == [{"image_id": ids[3], "duplicate_of": ids[2], "distance": 0}]
    assert len(CommandLine(tmp_path).json("duplicates", tmp_path, "--max-distance", "31")) > 1
    plain = planned(tmp_path / "plain", {"blank": {}})
    plain.generator().run_shard(plain.shard)
    assert "no checks.near_duplicates" in CommandLine(tmp_path)("duplicates", "plain", code=2).stderr


def test_a_picture_that_is_not_finite_gets_new_seeds(tmp_path: Path) -> None:
    job = planned(tmp_path, {"on_fail": "reroll", "blank": {}})
    generator = job.generator()
    draw = generator.model.draw
    broken = {job.requests[0].seed, job.requests[1].seed, *(candidate_seed(job.requests[1].seed, k) for k in range(9))}

    def overflow(requests: Any, *others: Any) -> DrawnAtOnce:
        finite = [request is None or request.seed not in broken for request in requests]
        return DrawnAtOnce(draw(requests, *others).wait()[0], finite)

    generator.model.draw = overflow  # type: ignore[method-assign]
    receipt = generator.run_shard(job.shard)
    found = rows(job)
    assert (found[0]["status"], found[0]["rerolls"], found[0]["failed_tried"]) == ("committed", 1, ["finite", ""])
    assert (found[1]["status"], found[1]["rerolls"]) == ("quarantined", 3)
    assert "not finite" in found[1]["error"]
    assert receipt.failed_making == 1  # a model that breaks down is a failure


def test_a_request_that_fails_is_not_tried_with_new_seeds(tmp_path: Path) -> None:
    job = planned(tmp_path, {"on_fail": "reroll", "best_of": 2, "clip_score": {**CLIP, "min": 0.99}})
    generator = job.generator()
    asked = []
    make = generator._maker.make

    def refuse(first: int, batch: Mapping[int, ImageRequest]) -> dict[int, Result]:
        asked.extend(batch)
        return make(first, batch) | ({1: Refused("no such picture")} if 1 in batch else {})

    generator._maker.make = refuse  # type: ignore[method-assign]
    generator.run_shard(job.shard)
    assert (asked.count(0), asked.count(1)) == (2 + 3, 1)
    assert (rows(job)[1]["error"], rows(job)[1]["failed_checks"]) == ("no such picture", None)
    # None of the others passes; the best of each is kept and says so.
    assert {row["failed_checks"] for row in rows(job) if row["status"] == "committed"} == {"clip_score"}


@pytest.mark.parametrize("form", ["images", "webdataset", "parquet"])
def test_what_was_found_is_part_of_the_data_set(form: str, tmp_path: Path) -> None:
    job = planned(tmp_path / "out", EVERYTHING, form)
    job.generator().run_shard(job.shard)
    assert write_job_card(job.store, job.job, job.spec)
    kept = [row for row in rows(job) if row["status"] == "committed"]
    found = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    stored = found["json"] if form == "webdataset" else found
    for name in ("seed", *check_columns(job.spec.checks)):
        assert [row[name] for row in stored] == [row[name] for row in kept]
    card = job.store.get("README.md").decode()
    assert "| requests that could not be made | 0 |" in card
    assert f"| pictures that checks dropped | {7 - len(kept)} |" in card


def test_an_actor_that_finds_another_scorer_than_was_planned_with_refuses(tmp_path: Path) -> None:
    job = planned(tmp_path, {"clip_score": CLIP})
    job.job = dataclasses.replace(job.job, deciding={"check_models": {"clip_score": "f" * 64}})
    with pytest.raises(ModelError, match=r"a model of checks is another one on"):
        job.generator()


def test_pictures_and_metadata_of_a_job_without_checks_tell_nothing_of_them(tmp_path: Path) -> None:
    job = Planned(tmp_path, "parquet", sections={"model": {"uri": "builtin:null"}})
    job.generator().run_shard(job.shard)
    assert not {"failed_checks", "seeds_tried"} & rows(job)[0].keys()
    assert "checks" not in job.spec.deciding()
    record = find_commit(job.store, job.shard)
    assert record is not None
    assert record.seconds.keys() == {"model", "shard"}
    assert b"sdbatch:Checks" not in job.store.get("data/0000000.parquet")
