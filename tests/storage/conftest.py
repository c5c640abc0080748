"""What the storage tests share: stores whose way to the S3 server breaks as told, and a disk that is soon full."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sdbatch.storage.s3 import S3Store
from tests.fault_proxy import FaultProxy


@pytest.fixture
def proxy(s3_server: str) -> Iterator[FaultProxy]:
    with FaultProxy.start(s3_server, seed=7) as started:
        yield started


@pytest.fixture
def store_by(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[FaultProxy], S3Store]:
    """A store below ``some/`` of a new bucket, reached by way of a proxy."""

    def by(proxy: FaultProxy) -> S3Store:
        with monkeypatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
            return S3Store(f"s3://{bucket}/some")

    return by


@pytest.fixture
def direct(bucket: str) -> S3Store:
    """The same place as ``store_by``, without a proxy."""
    return S3Store(f"s3://{bucket}/some")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one mebibyte."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no mount here: {mounted.stderr}")
    yield folder
    subprocess.run(["umount", folder], check=True)
