"""What an S3 store may answer: what is tried again, what ends at once, and in which words.

Passing are refusals for load, errors of the server, conflicts between writers, and connections and answers that
break. Everything else, above all credentials that are wrong or expired, will be no better in a minute.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import urllib3.exceptions
from botocore.exceptions import (
    BotoCoreError,
    ChecksumError,
    ClientError,
    CredentialRetrievalError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    SSLError,
)
from botocore.exceptions import ConnectionError as StoreConnectionError
from botocore.parsers import ResponseParserError

from sdbatch.errors import ObjectNotFound, StorageError, StoreAway

#: How long after its first failure an operation is tried again before the store counts as gone, in seconds.
PATIENCE = 90.0
#: Pauses are drawn between none and a bound that doubles from a fifth of a second up to this, in seconds.
LONGEST_PAUSE = 5.0

_Result = TypeVar("_Result")


class TornAnswer(Exception):
    """The connection ended where the answer's headers were still on the way."""


_BROKEN = (
    TornAnswer,
    ResponseParserError,
    ValueError,  # botocore's, at a date or a number that broke off
    StoreConnectionError,
    HTTPClientError,
    IncompleteReadError,
    ChecksumError,
    FlexibleChecksumError,
    CredentialRetrievalError,
    urllib3.exceptions.HTTPError,
)
_PASSING_STATUS = {408, 409, 429}
_PASSING_CODES = {
    "BadDigest",
    "IncompleteBody",
    "RequestLimitExceeded",
    "RequestThrottled",
    "RequestTimeout",
    "RequestTimeoutException",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "XAmzContentSHA256Mismatch",
}
_NO_CREDENTIALS = "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
_RENEW = "renew the credentials and run the same command again"
_ALLOW = "the policy must allow s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket here"
_REGION = "set AWS_DEFAULT_REGION to the bucket's region"
#: Refusals of whoever asks, whatever for.
_UNKNOWN = {
    "ExpiredToken": _RENEW,
    "ExpiredTokenException": _RENEW,
    "InvalidAccessKeyId": "check AWS_ACCESS_KEY_ID or the profile",
    "InvalidClientTokenId": "check AWS_ACCESS_KEY_ID or the profile",
    "InvalidToken": "check AWS_SESSION_TOKEN",
    "RequestExpired": "set this machine's clock",
    "RequestTimeTooSkewed": "set this machine's clock",
    "SignatureDoesNotMatch": "check AWS_SECRET_ACCESS_KEY",
    "TokenRefreshRequired": _RENEW,
}
_REMEDIES = _UNKNOWN | {
    "403": _ALLOW,
    "AccessDenied": _ALLOW,
    "AuthorizationHeaderMalformed": _REGION,
    "EntityTooLarge": "make output.shard_size smaller",
    "NotImplemented": "the store must know conditional puts (If-None-Match) and reading in parts (Range)",
    "PermanentRedirect": _REGION,
    "PreconditionFailed": "the object was replaced while it was read; run the same command again",
}


def patiently(where: str, operation: Callable[[], _Result], patience: float | None = None) -> _Result:
    """The operation's result, tried again after growing random pauses while what fails may pass.

    Raises ObjectNotFound, and StorageError at once for what won't pass. After ``patience`` seconds of failures (None:
    PATIENCE) that might have passed, and at once for credentials that are not accepted, that is StoreAway.
    """
    deadline, pause = None, 0.2
    while True:
        try:
            return operation()
        except (ClientError, BotoCoreError, *_BROKEN) as error:
            now = time.monotonic()
            deadline = deadline or now + (PATIENCE if patience is None else patience)
            if not _may_pass(error) or now > deadline:
                raise _in_words(where, error) from None
        time.sleep(random.uniform(0, pause))
        pause = min(pause * 2, LONGEST_PAUSE)


def code_of(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def status_of(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def field(answer: Mapping[str, Any], name: str) -> Any:
    """What every whole answer of its kind has. Raises TornAnswer where it is missing."""
    if name not in answer:
        raise TornAnswer(f"an answer without {name}")
    return answer[name]


def _may_pass(error: Exception) -> bool:
    if isinstance(error, ClientError):
        status, code = status_of(error), code_of(error)
        if error.operation_name == "PutObject" and status == 412:
            return True  # an object was there, and was gone when it was looked at
        if status == 501:
            return False
        return status >= 500 or status in _PASSING_STATUS or code in _PASSING_CODES
    if isinstance(error, SSLError):
        return not any(word in str(error) for word in ("CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION_NUMBER"))
    return isinstance(error, _BROKEN)


def _in_words(where: str, error: Exception) -> StorageError:
    if isinstance(error, (NoCredentialsError, PartialCredentialsError)):
        return StoreAway(f"{where}: {_NO_CREDENTIALS}")
    if isinstance(error, ClientError):
        code = code_of(error)
        if code in {"NoSuchKey", "404"}:
            return ObjectNotFound(f"{where} does not exist")
        if code == "NoSuchBucket":
            bucket = where.removeprefix("s3://").partition("/")[0]
            return StorageError(f"{where}: there is no bucket '{bucket}'; create it first")
        told = f"{code} {error.response.get('Error', {}).get('Message', '')}".strip().rstrip(".")
        remedy = f"; {_REMEDIES[code]}" if code in _REMEDIES else ""
        away = code in _UNKNOWN or _may_pass(error)
        return (StoreAway if away else StorageError)(f"{where}: {error.operation_name} was refused: {told}{remedy}")
    if isinstance(error, SSLError) and not _may_pass(error):
        return StoreAway(f"{where}: no trusted connection: {error}; check the endpoint, or set AWS_CA_BUNDLE")
    told = " ".join(str(error).split())
    return (
        StoreAway(f"{where}: the store can't be reached: {told}")
        if _may_pass(error)
        else StorageError(f"{where}: {told}")
    )
