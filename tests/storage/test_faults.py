"""The S3 store keeps its promises while requests are refused, connections break and the store goes away."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pytest

from sdbatch.engine.making import pictures
from sdbatch.engine.making.batch import BatchMaker, Made, arrived
from sdbatch.engine.making.pictures import BadPicture, read_picture
from sdbatch.engine.models.loading import bring
from sdbatch.engine.models.null import NullModel
from sdbatch.engine.planning import planner
from sdbatch.errors import Interrupted, ObjectNotFound, StorageError, StoreAway, UsageError
from sdbatch.prompts import ModelFacts, RowIds, find_table, read_wildcards, requests_of_slice
from sdbatch.spec import Prompt, parse_spec
from sdbatch.storage import patience, read_object
from sdbatch.storage import s3 as s3_module
from sdbatch.storage.s3 import S3Store
from tests.fault_proxy import RESETS, FaultProxy
from tests.outputs.test_outputs import picture

Reach = Callable[[FaultProxy], S3Store]

#: About every fourth request meets one of these.
ROUGH = {"503 SlowDown": 0.08, "500 InternalError": 0.04, **dict.fromkeys(RESETS, 0.04)}
MEBIBYTE = 1 << 20


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults by the hundred, without waiting seconds for each."""
    monkeypatch.setattr(patience, "LONGEST_PAUSE", 0.2)


def some_bytes(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def open_uploads(store: S3Store) -> list[str]:
    found = boto3.client("s3").list_multipart_uploads(Bucket=store.bucket)
    return [upload["Key"] for upload in found.get("Uploads", [])]


def test_every_object_is_there_once_with_its_bytes(proxy: FaultProxy, store_by: Reach, direct: S3Store) -> None:
    store = store_by(proxy)
    sent = {f"n/{i:03d}": some_bytes(1 + i * 300, i) for i in range(60)}
    proxy.set(ROUGH)

    def use(key: str) -> None:
        assert store.put_if_absent(key, sent[key])
        assert store.get(key) == sent[key]
        assert store.exists(key)
        assert not store.put_if_absent(key, b"another")
        store.put(f"{key}.old", sent[key])
        store.delete(f"{key}.old")
        assert not store.exists(f"{key}.old")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, sent))
    assert [(entry.key, entry.size) for entry in store.list("n/")] == [(key, len(sent[key])) for key in sent]
    counts = proxy.counts()
    assert all(counts[fault] > 5 for fault in ROUGH), counts
    assert {entry.key: direct.get(entry.key) for entry in direct.list()} == sent


def test_of_two_writers_one_wins_and_both_know(proxy: FaultProxy, store_by: Reach, direct: S3Store) -> None:
    first, second = store_by(proxy), store_by(proxy)
    proxy.set({**ROUGH, "reset after": 0.2})
    with ThreadPoolExecutor(8) as pool:
        for round_ in range(6):
            keys = [f"commits/{round_}-{i}" for i in range(4)]
            mine = [pool.submit(first.put_if_absent, key, f"mine {key}".encode()) for key in keys]
            theirs = [pool.submit(second.put_if_absent, key, f"theirs {key}".encode()) for key in keys]
            for key, mine_won, theirs_won in zip(keys, mine, theirs, strict=True):
                assert mine_won.result() != theirs_won.result()
                assert direct.get(key) == f"{'mine' if mine_won.result() else 'theirs'} {key}".encode()
    assert proxy.counts()["reset after"] > 5


def test_a_lost_acknowledgement_is_no_lost_race(proxy: FaultProxy, store_by: Reach, direct: S3Store) -> None:
    store = store_by(proxy)
    proxy.set({"reset after": 0.5}, only="^PUT")
    for i in range(12):
        assert store.put_if_absent(f"commits/{i}", f"record {i}".encode())
        assert direct.get(f"commits/{i}") == f"record {i}".encode()
    assert proxy.counts()["reset after"] >= 3


def test_ten_seconds_of_nothing_are_survived(s3_server: str, store_by: Reach, direct: S3Store) -> None:
    with FaultProxy.start(s3_server, seed=1) as refusing, FaultProxy.start(s3_server, seed=1) as silent:
        stores = {"refusing": store_by(refusing), "silent": store_by(silent)}
        for name, store in stores.items():
            store.put(f"{name}/before", b"here")
        refusing.outage(10)
        silent.outage(10, hang=True)
        with ThreadPoolExecutor(8) as pool:
            ended = [pool.submit(stores[name].put_if_absent, f"{name}/{i}", b"x") for name in stores for i in range(4)]
            assert all(put.result() for put in ended)
        assert [entry.key for entry in direct.list("refusing/")] == [f"refusing/{i}" for i in [*range(4), "before"]]
        assert [entry.key for entry in direct.list("silent/")] == [f"silent/{i}" for i in [*range(4), "before"]]


def test_a_server_that_stays_away_is_named(proxy: FaultProxy, store_by: Reach, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PATIENCE", 0.5)
    store = store_by(proxy)
    proxy.outage(600)
    with pytest.raises(StoreAway, match="some/x: the store can't be reached: Could not connect"):
        store.put("x", b"")


def test_a_row_is_at_fault_for_its_picture_unless_the_store_is_away(
    proxy: FaultProxy, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "PATIENCE", 0.5)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    for where, told in (
        ("s3://typo-bucket/a.png", "there is no bucket 'typo-bucket'"),
        (f"s3://{bucket}/none/a.png", "does not exist"),
    ):
        with pytest.raises(BadPicture, match=told):
            read_picture(where, "/", (8, 8))
    for refusal, told in (
        ("403 AccessDenied", "the policy must allow s3:GetObject"),  # S3, of a missing key to whoever may not list
        ("400 KeyTooLongError", "KeyTooLongError"),
    ):
        proxy.set({refusal: 1.0})
        with pytest.raises(BadPicture, match=f"init_image: .*{told}"):
            read_picture("a.png", f"s3://{bucket}", (8, 8))
    for refusal in ("400 ExpiredToken", "403 RequestTimeTooSkewed", "503 SlowDown"):
        proxy.set({refusal: 1.0})
        with pytest.raises(StoreAway):
            read_picture("a.png", f"s3://{bucket}", (8, 8))


def test_a_batch_reads_its_pictures_at_once_each_of_them_once(
    proxy: FaultProxy, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = picture(0)
    for i in range(8):
        S3Store(f"s3://{bucket}").put(f"{i}/start.png", start.data)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    together = threading.Barrier(8, timeout=30)

    def read(uri: str) -> bytes:
        together.wait()
        return read_object(uri)

    monkeypatch.setattr(pictures, "read_object", read)
    sections = {"output": {"uri": "out"}, "resources": {"batch_size": 16}}
    spec = parse_spec({"name": "t", "input": {"uri": "x.csv"}, **sections})
    rows: list[dict[str, str | None]] = [{"prompt": "a", "init_image": f"{i % 8}/start.png"} for i in range(16)]
    requests = requests_of_slice(rows, 0, spec, ModelFacts((64, 64)), RowIds(False))
    made = BatchMaker(NullModel(), spec, f"s3://{bucket}").make(0, dict(enumerate(requests)))
    assert all(isinstance(result, Made) for result in arrived(made).values())
    assert proxy.counts()["requests"] == 8


def test_a_store_that_is_away_is_no_mistake_in_the_spec(
    proxy: FaultProxy, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "PATIENCE", 0.5)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    uri = f"s3://{bucket}/x"
    spec = parse_spec({"name": "t", "input": {"uri": f"{uri}.csv"}, "output": {"uri": uri}})
    looks: dict[str, Callable[[], object]] = {
        "output.uri": lambda: planner.open_output(spec),
        "input.uri": lambda: find_table(spec.input),
        "prompt.wildcards": lambda: read_wildcards(Prompt(template="__a__", wildcards=uri)),
        "model": lambda: bring(uri),
    }
    for refusal, kind in (
        ("503 SlowDown", StoreAway),
        ("400 ExpiredToken", StoreAway),
        ("403 AccessDenied", UsageError),
    ):
        proxy.set({refusal: 1.0})
        for field, look in looks.items():
            with pytest.raises(
                kind, match=f"^{field}.*: s3://{bucket}/x.* was refused: ({refusal[:3]}|{refusal[4:]}) "
            ):
                look()


def test_missing_credentials_are_no_fault_of_what_is_asked_for(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    with pytest.raises(StoreAway, match="no credentials; set AWS_ACCESS_KEY_ID"):
        S3Store(f"s3://{bucket}").get("x")


def test_a_signal_is_no_fault_of_the_store(proxy: FaultProxy, store_by: Reach) -> None:
    """boto3 takes whatever is raised while it waits for a failed connection, which would be tried again."""
    store = store_by(proxy)
    store.put("x", b"here")

    def interrupt(number: int, frame: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        proxy.outage(3, hang=True)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(Interrupted):
            store.get("x")
    finally:
        signal.signal(signal.SIGALRM, before)


def test_refusals_that_pass_are_waited_out(proxy: FaultProxy, store_by: Reach) -> None:
    store = store_by(proxy)
    passing = [
        "400 BadDigest",
        "400 IncompleteBody",
        "400 RequestTimeout",
        "408 RequestTimeout",
        "409 ConditionalRequestConflict",
        "429 TooManyRequests",
        "502 BadGateway",
        "503 ServiceUnavailable",
    ]
    proxy.set(dict.fromkeys(passing, 0.08))
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda i: store.put_if_absent(f"x/{i}", b"1"), range(32)))
    assert len(list(store.list("x/"))) == 32
    assert all(proxy.counts()[refusal] for refusal in passing)


def test_what_will_not_pass_ends_at_once_with_its_remedy(proxy: FaultProxy, store_by: Reach, tmp_path: Path) -> None:
    store = store_by(proxy)
    remedies = {
        "400 ExpiredToken": "renew the credentials and run the same command again",
        "403 ExpiredTokenException": "renew the credentials and run the same command again",
        "403 InvalidAccessKeyId": "check AWS_ACCESS_KEY_ID or the profile",
        "403 SignatureDoesNotMatch": "check AWS_SECRET_ACCESS_KEY",
        "403 AccessDenied": "the policy must allow s3:GetObject",
        "403 RequestTimeTooSkewed": "set this machine's clock",
        "501 NotImplemented": "the store must know conditional puts",
    }
    attempts: dict[str, Callable[[], object]] = {
        "GetObject": lambda: store.get("x"),
        "PutObject": lambda: store.put_if_absent("x", b""),
        "ListObjectsV2": lambda: list(store.list()),
        "DeleteObject": lambda: store.delete("x"),
        "fetch": lambda: store.fetch("x", tmp_path / "x"),
        "exists": lambda: store.exists("x"),
    }
    for refusal, remedy in remedies.items():
        proxy.set({refusal: 1.0})
        for name, attempt in attempts.items():
            before = proxy.counts()[refusal]
            with pytest.raises(StorageError) as raised:
                attempt()
            assert f"was refused: {refusal[4:]} The proxy says so; {remedy}" in str(raised.value)
            assert isinstance(raised.value, StoreAway) == (refusal[4:] not in {"AccessDenied", "NotImplemented"})
            # The last two ask in other ways when an answer has no words.
            most = 3 if name in {"fetch", "exists"} else 1
            assert 1 <= proxy.counts()[refusal] - before <= most
    assert not (tmp_path / "x").exists()


def test_reads_that_are_cut_off_are_read_again(proxy: FaultProxy, store_by: Reach, tmp_path: Path) -> None:
    store = store_by(proxy)
    large = some_bytes(MEBIBYTE)
    sent = {"empty": b"", "large": large, "small": b"1"}
    for key, data in sent.items():
        store.put(f"x/{key}", data)
    version = store.version("x/small")
    proxy.set({"reset amid": 0.5})
    for i in range(2):
        for key, data in sent.items():
            assert store.get(f"x/{key}") == data
            store.fetch(f"x/{key}", tmp_path / f"{key}{i}")
            assert (tmp_path / f"{key}{i}").read_bytes() == data
        assert store.version("x/small") == version
        assert [entry.key for entry in store.list("x/")] == ["x/empty", "x/large", "x/small"]
    assert proxy.counts()["reset amid"] > 5


@pytest.mark.filterwarnings("ignore:tzname")  # a date that broke off
def test_an_answer_may_break_off_anywhere(store_by: Reach, proxy: FaultProxy) -> None:
    store = store_by(proxy)
    store.put("x/1", b"1")
    version = store.version("x/1")
    proxy.set({"reset amid": 0.7})

    def look(_: int) -> None:  # all but one byte of these answers are headers, or what describes the object
        assert store.get("x/1") == b"1"
        assert store.version("x/1") == version
        assert [(entry.key, entry.size) for entry in store.list("x/")] == [("x/1", 1)]
        assert store.put_if_absent("x/1", b"1")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(look, range(16)))
    assert proxy.counts()["reset amid"] > 50


def test_a_bucket_that_is_not_there_is_named_whatever_is_asked(s3_server: str, tmp_path: Path) -> None:
    store = S3Store("s3://no-such-bucket/x")
    attempts: list[Callable[[], object]] = [
        lambda: store.get("y"),
        lambda: store.put_if_absent("y", b""),
        lambda: list(store.list()),
        lambda: store.exists("y"),
        lambda: store.version("y"),
        lambda: store.fetch("y", tmp_path / "y"),
    ]
    for attempt in attempts:
        with pytest.raises(StorageError, match="there is no bucket 'no-such-bucket'; create it first"):
            attempt()


def test_what_is_not_there_is_not_fetched(direct: S3Store, tmp_path: Path) -> None:
    with pytest.raises(ObjectNotFound):
        direct.fetch("none", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> int:
    """Parts as small as S3 allows them."""
    monkeypatch.setattr(s3_module, "PART", 5 * MEBIBYTE)
    return s3_module.PART


def test_a_large_object_goes_up_in_parts_and_comes_back(
    proxy: FaultProxy, store_by: Reach, direct: S3Store, small_parts: int, tmp_path: Path
) -> None:
    data = some_bytes(small_parts + 1000)
    store_by(proxy).put("large", data)
    assert proxy.counts()["requests"] == 4  # create, two parts, complete
    direct.fetch("large", tmp_path / "large")
    assert (tmp_path / "large").read_bytes() == data
    assert not direct.put_if_absent("large", data[:-1])
    assert direct.put_if_absent("large", data)


def test_parts_are_sent_again_and_reads_go_on_where_they_broke(
    proxy: FaultProxy, store_by: Reach, small_parts: int, tmp_path: Path
) -> None:
    store = store_by(proxy)
    # Not to the request that begins an upload: one whose answer is lost is begun twice, the first without any part.
    proxy.set({fault: 2 * share for fault, share in ROUGH.items()}, only=r"^GET|^PUT|uploadId")
    for i in range(2):
        data = some_bytes(2 * small_parts + i, i)
        store.put("large", data)
        store.fetch("large", tmp_path / "large")
        assert (tmp_path / "large").read_bytes() == data
    assert open_uploads(store) == []


def test_a_lost_acknowledgement_of_a_whole_upload(
    proxy: FaultProxy, store_by: Reach, direct: S3Store, small_parts: int
) -> None:
    store = store_by(proxy)
    proxy.set({"reset after": 0.6}, only=r"^POST .*uploadId")
    for i in range(4):
        store.put(f"large/{i}", bytes(small_parts + i))
    assert proxy.counts()["reset after"]
    assert [entry.size for entry in direct.list("large/")] == [small_parts + i for i in range(4)]


def test_an_upload_that_was_completed_is_known_by_its_mark(
    proxy: FaultProxy, store_by: Reach, direct: S3Store, small_parts: int
) -> None:
    """Where the answer was lost, some servers know nothing of the upload when they are asked again."""
    store, client = store_by(proxy), boto3.client("s3")
    with ThreadPoolExecutor(1) as pool:
        proxy.set({"503 SlowDown": 1.0}, only=r"^POST .*uploadId")
        putting = pool.submit(store.put, "large", bytes(small_parts + 1))
        while not proxy.counts()["503 SlowDown"]:
            time.sleep(0.01)
        (upload,) = client.list_multipart_uploads(Bucket=store.bucket)["Uploads"]
        which: dict[str, Any] = {"Bucket": store.bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
        there: list[Any] = client.list_parts(**which)["Parts"]
        sent: Any = [{name: part[name] for name in ("PartNumber", "ETag")} for part in there]
        client.complete_multipart_upload(**which, MultipartUpload={"Parts": sent})
        proxy.set({"404 NoSuchUpload": 1.0}, only=r"^POST .*uploadId")
        putting.result()
    assert direct.get("large") == bytes(small_parts + 1)
    for key in ("large", "never"):  # another upload's object, and none: neither is ours
        with pytest.raises(StorageError, match="CompleteMultipartUpload was refused: NoSuchUpload"):
            store.put(key, bytes(small_parts + 2))
    assert open_uploads(store) == []


@pytest.mark.parametrize("fault", ["403 AccessDenied", "503 SlowDown", "reset after"])
def test_an_upload_that_fails_leaves_no_parts(
    fault: str, proxy: FaultProxy, store_by: Reach, small_parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "PATIENCE", 0.5)
    store = store_by(proxy)
    proxy.set({fault: 1.0}, only=r"^PUT .*partNumber=2")
    with pytest.raises(StorageError, match="some/large: "):
        store.put("large", bytes(2 * small_parts))
    assert proxy.counts()[fault]
    assert open_uploads(store) == []
    assert not store.exists("large")


def test_a_conditional_put_of_a_large_object_is_one_request(
    proxy: FaultProxy, store_by: Reach, small_parts: int
) -> None:
    store = store_by(proxy)
    assert store.put_if_absent("large", bytes(2 * small_parts))
    assert proxy.counts()["requests"] == 1
    with pytest.raises(StorageError, match=r"more than one conditional put can hold .* make output.shard_size smaller"):
        store.put_if_absent("larger", bytes(s3_module.LARGEST_PUT + 1))
    assert proxy.counts()["requests"] == 1


def test_an_object_replaced_while_it_is_fetched_is_no_mixture(
    proxy: FaultProxy, store_by: Reach, direct: S3Store, small_parts: int, tmp_path: Path
) -> None:
    store = store_by(proxy)
    direct.put("model", b"a" * 2 * small_parts)
    held = proxy.counts()["requests"] + 2  # the look at it, and its first part
    with ThreadPoolExecutor(1) as pool:
        proxy.set({"503 SlowDown": 1.0}, only="^GET")
        fetching = pool.submit(store.fetch, "model", tmp_path / "model")
        while proxy.counts()["requests"] < held:
            time.sleep(0.01)
        direct.put("model", b"b" * 2 * small_parts)
        proxy.set()
        with pytest.raises(StorageError, match="the object was replaced while it was read; run the same command again"):
            fetching.result()
    assert not (tmp_path / "model").exists()


def test_probes_that_come_and_go_disturb_nobody(direct: S3Store) -> None:
    def probe(_: int) -> None:
        assert direct.put_if_absent("probe", b"?")
        direct.delete("probe")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(probe, range(60)))
