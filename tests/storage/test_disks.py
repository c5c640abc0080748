"""The local store on disks that are full, in folders that hold symlinks, after writers that were killed."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sdbatch.errors import ObjectNotFound, StorageError
from sdbatch.storage import Entry, LocalStore
from sdbatch.storage.local import STAGING
from sdbatch.storage.s3 import S3Store

MEBIBYTE = 1 << 20


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def test_a_full_disk_is_named_and_holds_no_half_object(small_disk: Path) -> None:
    store = LocalStore(small_disk)
    store.put("a/whole", bytes(MEBIBYTE // 2))
    for put in (store.put, store.put_if_absent):
        with pytest.raises(StorageError, match=r"a/large can't be written: the disk is full; free some space"):
            put("a/large", bytes(MEBIBYTE))
    assert everything(small_disk) == ["a/whole"]
    store.delete("a/whole")
    assert store.put_if_absent("a/large", bytes(MEBIBYTE // 2))


def test_a_copy_that_the_disk_can_not_hold_is_removed(small_disk: Path, tmp_path: Path, direct: S3Store) -> None:
    for store in (LocalStore(tmp_path / "root"), direct):
        store.put("model", bytes(2 * MEBIBYTE))
        with pytest.raises(StorageError, match=r"model can't be copied to .*: the disk is full"):
            store.fetch("model", small_disk / "model")
        assert everything(small_disk) == []


def test_a_write_that_ends_midway_leaves_nothing(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MEBIBYTE, before[1]))
    try:
        for put in (store.put, store.put_if_absent):
            with pytest.raises(StorageError, match=r"a/large can't be written: File too large"):
                put("a/large", bytes(2 * MEBIBYTE))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert everything(tmp_path) == []


def test_what_killed_writers_left_is_swept_after_a_day(tmp_path: Path) -> None:
    LocalStore(tmp_path).put("x", b"1")
    for name, hours in {"old": 25, "young": 23}.items():
        staged = tmp_path / STAGING / name
        staged.write_bytes(b"half of so")
        os.utime(staged, (time.time() - hours * 3600,) * 2)
    LocalStore(tmp_path).put_if_absent("y", b"2")
    assert everything(tmp_path) == [f"{STAGING}/young", "x", "y"]


def uses(store: LocalStore, key: str, folder: Path) -> list[Callable[[], object]]:
    """Every way to an object but by listing."""
    return [
        lambda: store.get(key),
        lambda: store.fetch(key, folder / "fetched"),
        lambda: store.version(key),
        lambda: store.exists(key),
        lambda: store.put(key, b"new"),
        lambda: store.put_if_absent(key, b"new"),
        lambda: store.delete(key),
    ]


@pytest.mark.parametrize("key", ["file", "folder/secret", "folder/new", "gone", "inner/up/secret"])
def test_no_symlink_leads_out_of_the_root(key: str, tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "root"
    (root / "inner").mkdir(parents=True)
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    (root / "file").symlink_to(outside / "secret")
    (root / "folder").symlink_to(outside)
    (root / "gone").symlink_to(outside / "gone")
    (root / "inner/up").symlink_to("../../outside")
    before = everything(tmp_path)
    store = LocalStore(root)
    for use in uses(store, key, tmp_path):
        with pytest.raises(StorageError, match=rf"{key} leads out of .*root through a symlink, to .*outside"):
            use()
    for prefix in ("", key, key.partition("/")[0], f"{key}/"):
        with pytest.raises(StorageError, match=r"leads out of .*root through a symlink"):
            list(store.list(prefix))
    assert set(everything(tmp_path)) - {f"root/{STAGING}"} == set(before)
    assert (outside / "secret").read_bytes() == b"secret"


def test_nothing_is_staged_out_of_the_root(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "root").mkdir()
    (tmp_path / "root/_sdbatch").symlink_to(tmp_path / "outside")
    with pytest.raises(StorageError, match="leads out of"):
        LocalStore(tmp_path / "root").put("x", b"1")
    assert list((tmp_path / "outside").iterdir()) == []


def test_the_root_may_be_a_symlink_and_so_may_what_stays_below_it(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "real")
    store = LocalStore(tmp_path / "root")
    assert store.put_if_absent("a/x", b"1")
    (tmp_path / "real/a/same").symlink_to("x")
    (tmp_path / "real/b").symlink_to("a")
    assert store.get("a/same") == store.get("b/x") == b"1"
    assert list(store.list()) == [Entry("a/same", 1), Entry("a/x", 1)]  # a linked folder: where it lies
    assert not store.put_if_absent("b/x", b"2")


def test_what_a_user_names_to_be_read_may_be_linked(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("1")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/table.csv").symlink_to("../elsewhere")
    store = LocalStore(tmp_path / "root", linked=True)
    assert list(store.list()) == [Entry("table.csv", 1)]
    assert store.get("table.csv") == b"1"


def test_a_symlink_to_nothing_is_no_object(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    (tmp_path / "link").symlink_to("gone")
    assert list(store.list()) == []
    assert not store.exists("link")
    for use in (store.get, store.version, lambda key: store.put_if_absent(key, b"1")):
        with pytest.raises(ObjectNotFound, match="link is a symlink to gone, which does not exist"):
            use("link")
    store.put("link", b"1")
    assert everything(tmp_path) == ["link"]
    assert store.get("link") == b"1"


def test_symlinks_in_a_circle_are_named(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert not store.exists("a")
    for use in (store.get, store.version, lambda key: store.put_if_absent(key, b"1")):
        with pytest.raises(StorageError, match="a can't be read: Too many levels of symbolic links"):
            use("a")
    with pytest.raises(StorageError, match="a/x can't be written: "):
        store.put("a/x", b"1")
    with pytest.raises(StorageError, match="can't be listed: Too many levels of symbolic links"):
        list(store.list())


def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("folder/x", b"1")
    assert not store.exists("folder")
    for use in (store.get, store.version, lambda key: store.put_if_absent(key, b"1")):
        with pytest.raises(ObjectNotFound, match="folder is a folder, not a file"):
            use("folder")
    with pytest.raises(StorageError, match="folder can't be written: Is a directory"):
        store.put("folder", b"1")
    with pytest.raises(StorageError, match="folder can't be written: Is a directory"):
        store.delete("folder")


def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("file", b"1")
    for put in (store.put, store.put_if_absent):
        with pytest.raises(StorageError, match=r"file/x can't be written: .*file is no folder"):
            put("file/x", b"1")
    with pytest.raises(ObjectNotFound, match="file/x does not exist"):
        store.get("file/x")
    store.delete("file/x")
    assert list(store.list("file/")) == []
    assert everything(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_not_taken_for_empty(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o300)
    with pytest.raises(StorageError, match="locked/ can't be listed: Permission denied"):
        list(LocalStore(tmp_path).list("locked/"))


def test_probes_that_come_and_go_disturb_nobody(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)

    def probe(_: int) -> None:
        assert store.put_if_absent("probe", b"?")
        store.delete("probe")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(probe, range(100)))
