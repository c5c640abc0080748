"""A prefix of an S3 bucket, or of any store that speaks S3.

Endpoint, region and credentials come from the usual AWS variables and files.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
)

from sdbatch.errors import ObjectNotFound, StorageError
from sdbatch.storage.store import Entry, Store, check_key

#: How long an operation is tried again before the store counts as gone, in seconds.
PATIENCE = 90.0

_CONFIG = Config(
    retries={"mode": "standard", "total_max_attempts": 4},
    connect_timeout=3,
    read_timeout=30,
    max_pool_connections=32,
    request_checksum_calculation="when_required",
    response_checksum_validation="when_required",
)

_Result = TypeVar("_Result")


class S3Store(Store):
    """Objects of a bucket below a prefix; a conditional put is ``If-None-Match: *``."""

    def __init__(self, uri: str) -> None:
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if not bucket:
            raise StorageError(f"'{uri}' names no bucket; write s3://bucket/prefix")
        self.bucket, self.prefix = bucket, prefix.strip("/")
        self.uri = f"s3://{bucket}/{self.prefix}".rstrip("/")
        # A session of its own: the default one is not made for threads and never looks at the environment again.
        try:
            self._client: Any = boto3.session.Session().client("s3", config=_CONFIG)
        except (BotoCoreError, ValueError) as error:
            raise StorageError(f"{self.uri}: S3 can't be used: {error}") from None

    def get(self, key: str) -> bytes:
        def read() -> bytes:
            body: bytes = self._client.get_object(Bucket=self.bucket, Key=self._key(key))["Body"].read()
            return body

        return self._patiently(key, read)

    def fetch(self, key: str, path: Path) -> None:
        def copy() -> None:
            with path.open("wb") as file:
                body = self._client.get_object(Bucket=self.bucket, Key=self._key(key))["Body"]
                for part in body.iter_chunks(8 << 20):
                    file.write(part)

        try:
            self._patiently(key, copy)
        except OSError as error:
            raise StorageError(f"{self.uri}/{key} can't be copied to {path}: {error.strerror}") from None

    def put(self, key: str, data: bytes) -> None:
        self._patiently(key, lambda: self._client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        def write() -> bool:
            try:
                self._client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data, IfNoneMatch="*")
            except ClientError as error:
                if _code(error) != "PreconditionFailed" and _status(error) != 412:
                    raise
                # Somebody's object is there. It may be our own, whose acknowledgement was lost on the way.
                return self.get(key) == data
            return True

        return self._patiently(key, write)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        skip = len(self.prefix) + 1 if self.prefix else 0
        token: dict[str, str] = {}
        while True:
            page = self._patiently(
                prefix,
                lambda token=token: self._client.list_objects_v2(  # type: ignore[misc]
                    Bucket=self.bucket, Prefix=self._below(prefix), **token
                ),
            )
            for item in page.get("Contents", []):
                yield Entry(item["Key"][skip:], item["Size"])
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, key: str) -> None:
        self._patiently(key, lambda: self._client.delete_object(Bucket=self.bucket, Key=self._key(key)))

    def exists(self, key: str) -> bool:
        try:
            self.version(key)
        except ObjectNotFound:
            return False
        return True

    def version(self, key: str) -> str:
        head = self._patiently(key, lambda: self._client.head_object(Bucket=self.bucket, Key=self._key(key)))
        return "etag:" + str(head["ETag"]).strip('"')

    def _key(self, key: str) -> str:
        return self._below(check_key(key))

    def _below(self, prefix: str) -> str:
        return f"{self.prefix}/{prefix}" if self.prefix else prefix

    def _patiently(self, key: str, operation: Callable[[], _Result]) -> _Result:
        """Try again, after growing random pauses, what may pass: refusals for load, 5xx, broken connections."""
        deadline, pause = time.monotonic() + PATIENCE, 0.2
        where = f"{self.uri}/{key}"
        while True:
            try:
                return operation()
            except (NoCredentialsError, PartialCredentialsError):
                raise StorageError(
                    f"{where}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
                ) from None
            except ClientError as error:
                code, status = _code(error), _status(error)
                if code in {"NoSuchKey", "404"}:
                    raise ObjectNotFound(f"{where} does not exist") from None
                if code == "NoSuchBucket":
                    raise StorageError(f"{where}: there is no bucket '{self.bucket}'; create it first") from None
                passing = status >= 500 or status in {408, 409, 429} or code in {"SlowDown", "RequestTimeout"}
                if not passing or time.monotonic() > deadline:
                    told = error.response.get("Error", {}).get("Message", "")
                    raise StorageError(f"{where}: {error.operation_name} was refused: {code} {told}".strip()) from None
            except ParamValidationError as error:
                raise StorageError(f"{where}: {' '.join(str(error).split())}") from None
            except BotoCoreError as error:
                if time.monotonic() > deadline:
                    raise StorageError(f"{where}: the store can't be reached: {error}") from None
            time.sleep(random.uniform(0, pause))
            pause = min(pause * 2, 5.0)


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
