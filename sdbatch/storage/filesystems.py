"""Arrow's file systems, for readers that want files: tables, read by Ray.

Endpoints and credentials come from the usual variables of each: AWS_…, GOOGLE_APPLICATION_CREDENTIALS or
STORAGE_EMULATOR_HOST, AZURE_STORAGE_…, HF_TOKEN and HF_ENDPOINT.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as fs

from sdbatch.errors import StorageError, StoreAway

if TYPE_CHECKING:
    from huggingface_hub import HfFileSystem

HUB = "hf://"
HUB_NAME = re.compile(
    r"(?P<root>hf://datasets/(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[\w.-]+|[^/@]+))?)(?:/(?P<path>.*))?"
)
_PATIENCE = timedelta(seconds=30)
#: Refusals by the Hub of what was asked for; others are for load, or of who asks.
_REFUSED = set(range(400, 500)) - {401, 408, 429}
_AWAY = re.compile(
    r"cloud::Status\((UNAVAILABLE|UNAUTHENTICATED|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|INTERNAL|ABORTED)\b"
    r"|Azure Error: \[(\] (?!\d{3}\b)|AuthenticationFailed\]|\w*\] (401|408|429|5\d\d)\b)"
    r"|AWS Error (NETWORK_CONNECTION|INTERNAL_FAILURE|SERVICE_UNAVAILABLE|SLOW_DOWN|THROTTLING|REQUEST_TIMEOUT)\b"
    r"|AWS Error \w+ \(HTTP status (408|429|5\d\d)\)"
)


def filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system that a file lies on, and its path there. Raises StorageError where there can be none."""
    scheme, found, path = uri.partition("://")
    if not found:
        return fs.LocalFileSystem(), uri
    if scheme == "s3":
        return _s3(), path
    try:
        if scheme == "gs":
            return _gcs(), path
        if scheme == "az":
            return _azure(), path
    except (OSError, ValueError) as error:
        raise StorageError(f"{uri}: {unsigned(' '.join(str(error).split()))}") from None
    if scheme == "hf":
        return fs.PyFileSystem(fs.FSSpecHandler(hub())), path
    return fs.LocalFileSystem(), path


@contextmanager
def open_file(uri: str) -> Iterator[pa.NativeFile]:
    """A file to be read by Arrow, whose errors come as they are. Raises StoreAway where its store is out of reach."""
    files, path = filesystem(uri)
    try:
        with files.open_input_file(path) as file:
            yield file
    except Exception as error:
        told = unsigned(" ".join(str(error).split()))
        if is_away(told) or (uri.startswith(HUB) and hub_is_away(error)):
            raise StoreAway(f"{uri} can't be read: {told}") from None
        raise


def hub_is_away(error: Exception) -> bool:
    """Is this what reading from the Hub raises while it can't be reached, is overloaded or does not know who asks?

    The library's HTTP client has changed twice, and the errors of each come through as they are.
    """
    damaged = type(error) is OSError or isinstance(error, pa.ArrowException)  # contents that Arrow can't read
    if damaged or isinstance(error, (ValueError, FileNotFoundError)):
        return False
    return getattr(getattr(error, "response", None), "status_code", None) not in _REFUSED


def is_away(told: str) -> bool:
    """Is this what Arrow says of a store that can't be reached, is overloaded or does not know who asks?"""
    return _AWAY.search(told) is not None


def unsigned(told: str) -> str:
    """What an error says, its addresses without what follows a question mark: Arrow's tell Azure's signature there."""
    return re.sub(r"(://[^\s?'\"]*)\?[^\s'\"]*", r"\1", told)


def hub() -> HfFileSystem:
    """The Hub that HF_ENDPOINT names, or the one of Hugging Face."""
    from huggingface_hub import HfFileSystem  # takes long to import

    return HfFileSystem(endpoint=os.environ.get("HF_ENDPOINT"))


def _s3() -> fs.FileSystem:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    scheme, _, host = endpoint.rpartition("://")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return fs.S3FileSystem(
        endpoint_override=host or None,
        scheme=scheme or "https",
        region=region or ("us-east-1" if host else None),
        connect_timeout=5,
        request_timeout=30,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=8),
    )


def _gcs() -> fs.FileSystem:
    emulator = os.environ.get("STORAGE_EMULATOR_HOST", "")
    if not emulator:
        return fs.GcsFileSystem(retry_time_limit=_PATIENCE)
    scheme, _, host = emulator.rpartition("://")
    return fs.GcsFileSystem(
        anonymous=True, scheme=scheme or "http", endpoint_override=host.rstrip("/"), retry_time_limit=_PATIENCE
    )


def _azure() -> fs.FileSystem:
    told = _connection(os.environ.get("AZURE_STORAGE_CONNECTION_STRING", ""))
    account = told.get("AccountName") or os.environ.get("AZURE_STORAGE_ACCOUNT")
    if not account:
        raise ValueError("set AZURE_STORAGE_ACCOUNT, or AZURE_STORAGE_CONNECTION_STRING, to say which account it is in")
    key = told.get("AccountKey") or os.environ.get("AZURE_STORAGE_KEY")
    signature = told.get("SharedAccessSignature") or os.environ.get("AZURE_STORAGE_SAS_TOKEN")
    # Arrow puts it behind the address as it is; Azure hands it out with a question mark and without.
    token = None if key or not signature else f"?{signature.removeprefix('?')}"
    endpoint = urlsplit(told.get("BlobEndpoint", ""))
    if not endpoint.netloc:
        return fs.AzureFileSystem(account, account_key=key, sas_token=token)
    own = endpoint.netloc.startswith(f"{account}.")  # else an emulator, which has the account in the path
    authority = endpoint.netloc.removeprefix(account) if own else endpoint.netloc
    return fs.AzureFileSystem(
        account,
        account_key=key,
        sas_token=token,
        blob_storage_authority=authority,
        blob_storage_scheme=endpoint.scheme,
        dfs_storage_authority=authority.replace(".blob.", ".dfs."),
        dfs_storage_scheme=endpoint.scheme,
    )


def _connection(text: str) -> dict[str, str]:
    """``AccountName=…;AccountKey=…`` as a mapping."""
    pairs = (part.partition("=") for part in text.split(";") if part)
    return {name.strip(): value.strip() for name, _, value in pairs}
