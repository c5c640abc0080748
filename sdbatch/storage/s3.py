"""A prefix of an S3 bucket, or of any store that speaks S3.

Endpoint, region and credentials come from the usual AWS variables and files.

Whatever is put by ``put_if_absent`` goes up as one plain conditional PUT, however large: not every store looks at
``If-None-Match`` when an upload in parts is completed, and where one does not, two writers would both win.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from sdbatch.errors import ObjectNotFound, StorageError
from sdbatch.storage.patience import TornAnswer, code_of, field, patiently, status_of
from sdbatch.storage.store import Entry, Store, cause, check_key, same_bytes

#: Objects of more bytes than this are put in parts of this size, and fetched in such parts. S3 asks for 5 MiB or more.
PART = 64 << 20
#: What one PUT can hold.
LARGEST_PUT = 5 << 30

_PIECE = 1 << 20
_ABORTING = 15.0  # seconds of patience for removing the parts of an upload that failed
_MARK = "sdbatch-upload"

# One attempt: `patiently` alone decides what is tried again. While a new connection sends, the time to connect is
# also how long a send may stand still; the time to read includes the store's work on a large object it has received.
_CONFIG = Config(
    retries={"mode": "standard", "total_max_attempts": 1},
    connect_timeout=10,
    read_timeout=60,
    max_pool_connections=64,
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
            body: bytes = _body(self._client.get_object(**self._at(key))).read()
            return body

        return self._patiently(key, read)

    def fetch(self, key: str, path: Path) -> None:
        head = self._head(key)
        size, tag = head["ContentLength"], head["ETag"]

        def copy(file: BinaryIO, start: int, length: int) -> None:
            file.seek(start)
            span = f"bytes={start}-{start + length - 1}"
            answer = self._client.get_object(**self._at(key), Range=span, IfMatch=tag)
            for piece in _body(answer, length).iter_chunks(_PIECE):
                file.write(piece)
            if not str(answer.get("ContentRange", "")).endswith(f"/{size}"):
                raise StorageError(
                    f"{self.uri}/{key} is not {size:,} bytes long, as the store said; run the same command again"
                )

        try:
            with path.open("wb") as file:
                for start in range(0, size, PART):
                    self._patiently(key, partial(copy, file, start, min(PART, size - start)))
        except OSError as error:
            path.unlink(missing_ok=True)
            raise StorageError(f"{self.uri}/{key} can't be copied to {path}: {cause(error)}") from None
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def put(self, key: str, data: bytes) -> None:
        if len(data) > PART:
            self._put_in_parts(key, data)
        else:
            self._patiently(key, lambda: self._client.put_object(**self._at(key), Body=data))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        if len(data) > LARGEST_PUT:
            raise StorageError(
                f"{self.uri}/{key}: {len(data):,} bytes are more than one conditional put can hold ({LARGEST_PUT:,}); "
                "make output.shard_size smaller"
            )

        def write() -> bool:
            try:
                self._client.put_object(**self._at(key), Body=data, IfNoneMatch="*")
            except ClientError as refusal:
                if status_of(refusal) != 412 and code_of(refusal) != "PreconditionFailed":
                    raise
                # Somebody's object is there. It may be our own, whose acknowledgement was lost on the way.
                try:
                    return self._holds(key, data)
                except ClientError as error:
                    raise (refusal if code_of(error) == "NoSuchKey" else error) from None
            return True

        return self._patiently(key, write)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        skip = len(self.prefix) + 1 if self.prefix else 0
        token: dict[str, str] = {}

        def read() -> dict[str, Any]:
            page: dict[str, Any] = self._client.list_objects_v2(Bucket=self.bucket, Prefix=self._below(prefix), **token)
            field(page, "IsTruncated")
            return page

        while True:
            page = self._patiently(prefix, read)
            for item in page.get("Contents", []):
                yield Entry(item["Key"][skip:], item["Size"])
            if not page["IsTruncated"]:
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, key: str) -> None:
        self._patiently(key, lambda: self._client.delete_object(**self._at(key)))

    def exists(self, key: str) -> bool:
        try:
            self._head(key)
        except ObjectNotFound:
            return False
        return True

    def clock(self, key: str) -> float:
        told = self._head(key)["ResponseMetadata"]["HTTPHeaders"].get("date", "")
        return parsedate_to_datetime(told).timestamp() if told else time.time()

    def version(self, key: str) -> str:
        return "etag:" + str(self._head(key)["ETag"]).strip('"')

    def _head(self, key: str) -> dict[str, Any]:
        """The object's size and tag. An answer to HEAD that refuses has no words; one to GET has."""

        def ask() -> dict[str, Any]:
            try:
                answer: dict[str, Any] = self._client.head_object(**self._at(key))
            except ClientError as error:
                if status_of(error) >= 500 and status_of(error) != 501:
                    raise
                answer = self._client.get_object(**self._at(key))
                answer["Body"].close()
            field(answer, "ContentLength")
            _tag(answer)
            return answer

        return self._patiently(key, ask)

    def _holds(self, key: str, data: bytes) -> bool:
        """Does the object have these bytes? One attempt."""
        answer = self._client.get_object(**self._at(key))
        with contextlib.closing(_body(answer)) as body:
            return same_bytes(body.iter_chunks(_PIECE), data)

    def _put_in_parts(self, key: str, data: bytes) -> None:
        """Upload in parts, none of which is left behind on failure. Each part has its own patience.

        The upload's mark is stored with the object and tells a completed one whose acknowledgement was lost.
        """
        mark = uuid.uuid4().hex
        upload = {**self._at(key)}
        upload["UploadId"] = self._patiently(
            key,
            lambda: field(self._client.create_multipart_upload(**self._at(key), Metadata={_MARK: mark}), "UploadId"),
        )

        def send(number: int, piece: bytes) -> dict[str, Any]:
            answer = self._client.upload_part(**upload, PartNumber=number, Body=piece)
            return {"PartNumber": number, "ETag": _tag(answer)}

        def complete() -> None:
            try:
                answer = self._client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
                field(answer, "ETag")
            except ClientError as error:
                if code_of(error) != "NoSuchUpload" or not self.exists(key):
                    raise
                if self._head(key).get("Metadata", {}).get(_MARK) != mark:
                    raise

        try:
            parts = []
            for number, start in enumerate(range(0, len(data), PART), 1):
                piece = data[start : start + PART]
                parts.append(self._patiently(key, partial(send, number, piece)))
            self._patiently(key, complete)
        except BaseException:
            with contextlib.suppress(StorageError):
                self._patiently(key, lambda: self._client.abort_multipart_upload(**upload), _ABORTING)
            raise

    def _at(self, key: str) -> dict[str, Any]:
        return {"Bucket": self.bucket, "Key": self._below(check_key(key))}

    def _below(self, prefix: str) -> str:
        return f"{self.prefix}/{prefix}" if self.prefix else prefix

    def _patiently(self, key: str, operation: Callable[[], _Result], patience: float | None = None) -> _Result:
        return patiently(f"{self.uri}/{key}", operation, patience)


def _body(answer: Mapping[str, Any], length: int | None = None) -> Any:
    """The answer's body, whose end can be told from a broken connection: by its ``length``, or as it is chunked."""
    if "chunked" not in answer["ResponseMetadata"]["HTTPHeaders"].get("transfer-encoding", ""):
        told = field(answer, "ContentLength")
        if length is not None and told != length:
            answer["Body"].close()
            raise TornAnswer(f"{told} bytes instead of {length}")
    return answer["Body"]


def _tag(answer: Mapping[str, Any]) -> str:
    """The whole ETag: the only header whose value would be missed if the answer broke off within it."""
    tag: str = field(answer, "ETag")
    if tag.startswith('"') and not (tag.endswith('"') and len(tag) > 1):
        raise TornAnswer(f"an answer with the ETag {tag}")
    return tag
