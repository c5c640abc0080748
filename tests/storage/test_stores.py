"""Every store keeps the same promises: a local folder, and S3 over a socket."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sdbatch.errors import ObjectNotFound, StorageError
from sdbatch.storage import Entry, LocalStore, Store, open_store
from sdbatch.storage.s3 import S3Store


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(str(tmp_path / "root"))
    return open_store(f"s3://{request.getfixturevalue('bucket')}/some/prefix")


def test_what_is_put_is_got(store: Store) -> None:
    store.put("data/a.png", b"one")
    store.put("data/a.png", b"two")
    assert store.get("data/a.png") == b"two"
    with pytest.raises(ObjectNotFound, match="data/none does not exist"):
        store.get("data/none")


def test_a_conditional_put_never_replaces(store: Store) -> None:
    assert store.put_if_absent("commits/1", b"mine")
    assert store.put_if_absent("commits/1", b"mine")  # the same bytes: as good as ours
    assert not store.put_if_absent("commits/1", b"theirs")
    assert store.get("commits/1") == b"mine"


def test_of_many_racing_writers_exactly_one_wins(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        for key in range(12):
            words = [f"writer {i}".encode() for i in range(8)]
            won = list(pool.map(lambda word, key=key: store.put_if_absent(f"race/{key}", word), words))
            assert sum(won) == 1
            assert store.get(f"race/{key}") == words[won.index(True)]


def test_listing_is_ordered_and_by_prefix(store: Store) -> None:
    for key in ("b/2", "b/10", "b/1", "a/x/y", "bb"):
        store.put(key, key.encode())
    assert list(store.list("b/")) == [Entry("b/1", 3), Entry("b/10", 4), Entry("b/2", 3)]
    assert [entry.key for entry in store.list()] == ["a/x/y", "b/1", "b/10", "b/2", "bb"]
    assert list(store.list("none/")) == []
    assert store.exists("b/1")
    assert not store.exists("b")


def test_a_folder_is_listed_in_the_order_of_keys(store: Store) -> None:
    keys = ["a-b", "a.b", "a/b", "a/b-/x", "a/b.png", "a/c/0", "a0", "b/é", "b/z"]
    for key in reversed(keys):
        store.put(key, b"")
    assert [entry.key for entry in store.list()] == sorted(keys)
    assert [entry.key for entry in store.list("a/b")] == ["a/b", "a/b-/x", "a/b.png"]


def test_a_folder_is_read_only_as_far_as_it_is_asked_for(tmp_path: Path) -> None:
    """A job of any size is listed in the memory that its largest folder takes."""
    store = LocalStore(tmp_path)
    for key in ("0/a", "1/a"):
        store.put(key, b"")
    listed = store.list()
    assert next(listed).key == "0/a"
    store.put("1/b", b"")
    assert [entry.key for entry in listed] == ["1/a", "1/b"]


def test_a_listing_longer_than_a_page_is_whole(bucket: str) -> None:
    store = open_store(f"s3://{bucket}")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: store.put(f"n/{i:05d}", b""), range(1100)))
    assert [entry.key for entry in store.list("n/")] == [f"n/{i:05d}" for i in range(1100)]


def test_deleting_twice_is_no_error(store: Store) -> None:
    store.put("x", b"1")
    store.delete("x")
    store.delete("x")
    assert not store.exists("x")


def test_the_version_changes_with_the_bytes(store: Store) -> None:
    store.put("x", b"1")
    first = store.version("x")
    assert store.version("x") == first
    store.put("x", b"2")
    assert store.version("x") != first


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/passwd", "a//b", "", "a\0b", "."])
def test_no_key_leaves_the_root(key: str, store: Store) -> None:
    with pytest.raises(StorageError):
        store.put(key, b"")


def test_a_local_folder_holds_no_half_written_file(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("a/b", b"x" * 100)
    store.put_if_absent("a/c", b"y")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["b", "c"]
    assert list((tmp_path / "_sdbatch/tmp").iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(StorageError, match="locked/x can't be written: Permission denied"):
        LocalStore(tmp_path / "locked").put("x", b"")


def test_a_file_where_a_folder_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file/x can't be written: .*file is no folder"):
        LocalStore(tmp_path / "file").put("x", b"")


def test_wrong_credentials_end_at_once(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match=r"was refused: SignatureDoesNotMatch .*; check AWS_SECRET_ACCESS_KEY"):
        S3Store(f"s3://{bucket}").put("x", b"")


def test_broken_settings_are_named(monkeypatch: pytest.MonkeyPatch, s3_server: str) -> None:
    with pytest.raises(StorageError, match=r"My Bucket.*Invalid bucket name"):
        S3Store("s3://My Bucket/x").put("y", b"")
    monkeypatch.setenv("AWS_PROFILE", "nope")
    with pytest.raises(StorageError, match=r"S3 can't be used: .*nope"):
        S3Store("s3://bucket")
    monkeypatch.delenv("AWS_PROFILE")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    with pytest.raises(StorageError, match=r"S3 can't be used: .*localhost:9000"):
        S3Store("s3://bucket")
    with pytest.raises(StorageError, match="home directory"):
        LocalStore("~nobody-of-that-name/x")


def test_other_schemes_are_refused() -> None:
    with pytest.raises(StorageError, match=r"use a folder or s3://bucket/prefix"):
        open_store("ftp://host/x")
