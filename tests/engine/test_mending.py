"""After the run: what failed is made again, what was lost is repaired, what grew is extended, by the commands."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sdbatch import cli
from sdbatch.engine.mending import _together, deciding_of
from sdbatch.engine.recompute import recompute
from sdbatch.engine.runner import Outcome
from sdbatch.errors import StorageError
from sdbatch.ledger import Again, Round, Status, put_round
from sdbatch.spec import overridden, parse_spec
from sdbatch.storage import LocalStore
from tests.conftest import CommandLine
from tests.ledger.planned import Planned

Write = Callable[..., Path]


@pytest.fixture(params=["images", "webdataset"])
def job(request: pytest.FixtureRequest, write_job: Write, tmp_path: Path) -> Path:
    """Twelve rows, of which two start from pictures that are not there yet, and one has no prompt."""
    rows = [f"a red circle {i},{'late.png' if i in (3, 6) else ''}" for i in range(11)]
    (tmp_path / "prompts.csv").write_text("\n".join(["prompt,start", *rows, ",", ""]))
    return write_job(
        model={"uri": "builtin:null"},
        input={"columns": {"init_image": "start"}},
        output={"format": request.param, "shard_size": 5},
        failures={"max_failed_fraction": 1},
    )


def test_what_failed_is_retried_and_nothing_else_touched(sdbatch: CommandLine, job: Path, tmp_path: Path) -> None:
    sdbatch("run", job, code=3)
    store = LocalStore(tmp_path / "out")
    before = {row["image_id"]: row for row in rows(tmp_path)}
    assert {name for name, row in before.items() if row["error"]} == {"00000003-0", "00000006-0", "00000011-0"}
    failed = sdbatch.json("retry", "out", code=3)
    assert (failed["made_now"], failed["quarantined"]) == (2, 3)  # the picture is still missing

    Image.new("RGB", (16, 16), "red").save(tmp_path / "late.png")
    told = sdbatch.json("retry", "out", "--set", "resources.actors=2", code=3)
    assert (told["state"], told["committed"], told["quarantined"]) == ("complete", 11, 1)  # no prompt: refused for good
    after = {row["image_id"]: row for row in rows(tmp_path)}
    for name, row in before.items():
        if not row["error"]:
            assert after[name]["sha256"] == row["sha256"]
    assert after["00000003-0"]["seed"] == before["00000003-0"]["seed"]
    assert sdbatch.json("status", "out")["reasons"] == {"the prompt is empty": 1}
    for name in ("00000003-0", "00000002-0"):  # made by the retry, and carried over by it
        assert sdbatch.json("remake", "out", name, "--to", "again.png")["same"]
    assert "is quarantined: row 12" in sdbatch("remake", "out", "00000011-0", "--to", "again.png", code=2).stderr
    verdict = sdbatch.json("verify", "out")
    assert verdict["ok"]
    assert verdict["extra"] == []
    rounds = [json.loads(store.get(entry.key)) for entry in store.list("_sdbatch/rounds/")]
    assert [found["changed"] for found in rounds] == [[], []]  # who does the work decides nothing
    sdbatch("run", job, code=3)  # is done, and stays so
    assert {row["image_id"]: row["sha256"] for row in rows(tmp_path)} == {n: row["sha256"] for n, row in after.items()}


def test_what_a_retry_made_otherwise_is_repaired_as_it_was(
    sdbatch: CommandLine, write_job: Write, tmp_path: Path
) -> None:
    (tmp_path / "prompts.csv").write_text("prompt,start\na red circle,late.png\na blue ring,\n")
    image = {"type": "jpeg", "quality": 90}
    sections = {"model": {"uri": "builtin:null"}, "output": {"image": image}, "failures": {"max_failed_fraction": 1}}
    table = {"uri": "prompts.csv", "columns": {"init_image": "start"}}
    sdbatch("run", write_job(**sections, input=table), code=3)
    (tmp_path / "moved").mkdir()
    (tmp_path / "prompts.csv").rename(tmp_path / "moved/prompts.csv")
    Image.new("RGB", (16, 16), "red").save(tmp_path / "moved/late.png")
    here = ("--set", "input.uri=moved/prompts.csv")
    sdbatch("retry", "out", "--set", "output.image.quality=10", *here)
    before, store = {row["image_id"]: row["sha256"] for row in rows(tmp_path)}, LocalStore(tmp_path / "out")
    assert len(before) == 2
    for row in rows(tmp_path):
        store.delete(str(row["path"]))
    lost = sdbatch("repair", "out", code=2).stderr
    assert "prompts.csv names no table" in lost
    assert "where it lies now is said by --set" in lost
    assert sdbatch.json("repair", "out", *here)["made_now"] >= 2
    assert {row["image_id"]: row["sha256"] for row in rows(tmp_path)} == before
    proved = sdbatch("verify", "out", "--recompute", "1", *here).stderr
    assert "0 of 0 images made again have the same bytes" in proved
    assert "of 1 asked for: a shard gives no more than its part" in proved
    assert sdbatch.json("remake", "out", "00000000-0", "--to", "again.jpeg", *here)["same"]
    rounds = [json.loads(store.get(entry.key)) for entry in store.list("_sdbatch/rounds/")]
    assert sorted(found["changed"] for found in rounds) == [[], *2 * [["output.image.quality=10"]]]


@pytest.mark.parametrize("change", ["model.dtype=float16", "checks.clip_score.min=0.2", "output.uri=elsewhere"])
def test_what_is_made_as_it_was_is_told_only_where_things_lie(
    change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Planned(LocalStore(tmp_path)).commit(0)
    for command in (["repair", str(tmp_path)], ["remake", str(tmp_path), "0/0", "--to", "x.png"]):
        assert cli.call([*command, "--set", change]) == 2
        assert (
            f"{change}: can't be changed for what is made as it was (what can: input.uri, " in capsys.readouterr().err
        )


def test_weights_that_are_added_elsewhere_weigh_what_they_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Planned(LocalStore(tmp_path))
    assert cli.call(["repair", str(tmp_path), "--set", "model.loras=[{uri: moved.safetensors}]"]) == 2
    assert "would make other pictures than were made" in capsys.readouterr().err


#: Each as another place or number than the job below has.
HERE = (
    "input.uri=moved.csv",
    "prompt.wildcards=moved",
    "model.uri=moved",
    "model.tokenizer=moved",
    "checks.clip_score.model=moved",
    "checks.safety.model=moved",
    "resources.actors=7",
    "resources.usd_per_gpu_hour=2.5",
    "resources.budget_usd=9.0",
    "failures.max_attempts=7",
    "notify.url=https://example.org",
)


def test_a_round_remembers_what_decides_pictures() -> None:
    checks = {"clip_score": {"model": "here", "min": 0.1}, "safety": {"model": "here"}}
    prompt = {"template": "a {__colours__|red} ring", "wildcards": "here"}
    spec = parse_spec(
        {
            "name": "t",
            "input": {"uri": "x.csv"},
            "output": {"uri": "out"},
            "prompt": prompt,
            "checks": checks,
            "resources": {"usd_per_gpu_hour": 1.0},
        }
    )
    for change in HERE:
        assert overridden(spec, [change]).deciding() == spec.deciding()
    assert deciding_of([*HERE, "model.dtype=float16", "resources.batch_size=2"]) == (
        "model.dtype=float16",
        "resources.batch_size=2",
    )


@pytest.mark.parametrize("change", ["generate.seed=8", "output.image.type=webp", "output.image={type: webp}"])
def test_what_the_plan_has_fixed_cannot_be_changed_for_a_retry(
    change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor in which form pictures are: those that stay are beside the new ones, and end alike."""
    assert cli.call(["retry", str(tmp_path), "--set", change]) == 2
    assert f"{change}: can't be changed for a retry" in capsys.readouterr().err


def test_other_settings_are_for_what_is_made_again_alone(sdbatch: CommandLine, job: Path, tmp_path: Path) -> None:
    sdbatch("plan", job)
    ended = sdbatch("retry", "out", "--set", "model.dtype=bfloat16", code=2)
    assert "--set model.dtype=bfloat16: the job has images still to make, which are planned otherwise" in ended.stderr
    told = sdbatch.json("retry", "out", "--set", "resources.actors=2", code=3)  # decides nothing
    assert told["state"] == "complete"
    changes = ("model.dtype=bfloat16",)
    put_round(LocalStore(tmp_path / "out"), Round(2, "retry", changes, {0: Again(0, 1, (3,))}))  # stopped at once
    ended = sdbatch("retry", "out", "--set", "model.dtype=float16", code=2)
    assert "--set model.dtype=float16: the job has images still to make" in ended.stderr
    assert sdbatch.json("retry", "out", "--set", changes[0], code=3)["state"] == "complete"  # the same command goes on


def test_what_was_lost_or_altered_is_repaired_to_the_same_bytes(
    sdbatch: CommandLine, job: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (16, 16), "red").save(tmp_path / "late.png")
    sdbatch("run", job, code=3)
    store = LocalStore(tmp_path / "out")
    before = {row["image_id"]: row["sha256"] for row in rows(tmp_path)}
    data = [entry.key for entry in store.list("data/") if not entry.key.endswith("/metadata.parquet")]
    again = sdbatch.json("verify", "out", "--recompute", "4")
    assert (again["ok"], again["recomputed"], again["different"]) == (True, 4, [])
    requests = next(entry.key for entry in store.list("_sdbatch/plan/") if "/requests-" in entry.key)
    planned = store.get(requests)
    store.put(requests, planned[:100])
    with pytest.raises(StorageError, match=r"^\S+ is damaged: [^\n]*$"):  # told by an actor, as it is told here
        recompute(store, 1, [], lambda done, total: None)
    store.put(requests, planned)
    store.delete(data[0])
    store.put(data[-1], store.get(data[-1])[:300] + b"x" * 300)
    store.delete("metadata/0000001.parquet")
    assert not sdbatch.json("verify", "out", code=1)["ok"]
    told = sdbatch.json("repair", "out", code=3)
    assert (told["state"], told["committed"]) == ("complete", 11)
    assert told["made_now"] < 11 or data[0].endswith(".tar")  # what stayed in the shards is not counted
    assert sdbatch.json("verify", "out")["ok"]
    assert {row["image_id"]: row["sha256"] for row in rows(tmp_path)} == before

    # A picture twice over, by a writer who lived on; a record that counts wrongly; something of the user's own.
    store.put("metadata/0000000r9.parquet", store.get(next(iter(store.list("metadata/"))).key))
    key = "_sdbatch/committed/00000r2.parquet"
    table = pq.read_table(io.BytesIO(store.get(key)))
    records = [json.loads(text) for text in table.column("record").to_pylist()]
    records[1]["bytes"] += 1
    buffer = io.BytesIO()
    pq.write_table(table.set_column(1, "record", [[json.dumps(record) for record in records]]), buffer)
    store.put(key, buffer.getvalue())
    store.put("data/notes.txt", b"mine")
    verdict = sdbatch.json("verify", "out", code=1)
    assert verdict["leftover"] == ["metadata/0000000r9.parquet"]
    assert verdict["altered"]
    told = sdbatch.json("repair", "out", code=3)
    made = told["committed"], told["made_now"], told["batches"]
    assert (told["state"], made) == ("complete", (11, 0, 0))  # nothing had to be computed
    verdict = sdbatch.json("verify", "out")
    assert (verdict["ok"], verdict["extra"]) == (True, ["data/notes.txt"])
    assert {row["image_id"]: row["sha256"] for row in rows(tmp_path)} == before


def test_rounds_that_follow_each_other_are_told_as_one() -> None:
    status = Status("t", "out", "complete", 40, 40, 0, 5, 5, 0, 0.0)
    first = Outcome(status, images=30, batches=4, starting_seconds=5.0, making_seconds=10.0, deaths=1)
    last = Outcome(status, images=10, batches=2, starting_seconds=20.0, making_seconds=5.0, deaths=0)
    whole = _together([first, last])
    assert (whole.images, whole.batches, whole.deaths) == (40, 6, 1)
    assert (whole.starting_seconds, whole.making_seconds) == (5.0, 20.0)  # from the first model on, to the end of all


def rows(folder: Path) -> list[dict[str, object]]:
    found: list[dict[str, object]] = ds.dataset(folder / "out/metadata").to_table().to_pylist()
    return found
