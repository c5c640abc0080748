"""Data sets of the Hugging Face Hub, to be read: ``hf://datasets/OWNER/NAME[@REVISION]/path``.

Whatever revision is named, what is read is one commit: the one that it stood for when the source was opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote

from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from sdbatch.errors import ObjectNotFound, StorageError, StoreAway
from sdbatch.storage.filesystems import HUB, HUB_NAME, hub, hub_is_away, unsigned
from sdbatch.storage.store import Entry, Source, check_key

_COMMIT = re.compile("[0-9a-f]{40}")


class HubFiles(Source):
    """Files of a data set's repository below a folder, as of one commit, which ``uri`` names."""

    def __init__(self, uri: str) -> None:
        found = HUB_NAME.fullmatch(uri)
        if found is None:
            raise StorageError(f"'{uri}' should be hf://datasets/OWNER/NAME, and @REVISION and /path if any")
        repo, revision = found["repo"], unquote(found["revision"] or "main")
        if not _COMMIT.fullmatch(revision):
            with _asking(uri, repo):
                revision = str(HfApi(endpoint=os.environ.get("HF_ENDPOINT")).dataset_info(repo, revision=revision).sha)
        self._root = "/".join(filter(None, [f"datasets/{repo}@{revision}", (found["path"] or "").strip("/")]))
        self._repo = repo
        self.uri = f"{HUB}{self._root}"
        self._files = hub()

    def get(self, key: str) -> bytes:
        with _asking(f"{self.uri}/{key}", self._repo):
            data: bytes = self._files.cat_file(self._path(key))
            return data

    def list(self, prefix: str = "") -> Iterator[Entry]:
        folder = prefix.rpartition("/")[0]
        try:
            with _asking(f"{self.uri}/{folder}", self._repo):
                found: Any = self._files.find(self._path(folder) if folder else self._root, detail=True)
        except ObjectNotFound:
            return
        skip = len(self._root) + 1
        entries = [Entry(path[skip:], info["size"]) for path, info in found.items()]
        yield from sorted((entry for entry in entries if entry.key.startswith(prefix)), key=lambda entry: entry.key)

    def version(self, key: str) -> str:
        info = self._info(key)
        large = info.get("lfs")
        return f"sha256:{large['sha256']}" if large else f"git:{info['blob_id']}"

    def exists(self, key: str) -> bool:
        return self.find(key) is not None

    def find(self, key: str) -> Entry | None:
        try:
            info = self._info(key)
        except ObjectNotFound:
            return None
        return Entry(key, info["size"]) if info["type"] == "file" else None

    def _info(self, key: str) -> dict[str, Any]:
        with _asking(f"{self.uri}/{key}", self._repo):
            return dict(self._files.info(self._path(key)))

    def _path(self, key: str) -> str:
        return f"{self._root}/{check_key(key)}"


@contextmanager
def _asking(uri: str, repo: str) -> Iterator[None]:
    try:
        yield
    except GatedRepoError:
        told = f"its terms must be accepted at https://huggingface.co/datasets/{repo} and HF_TOKEN be set"
    except RepositoryNotFoundError:
        told = "there is no such data set, or it is private and HF_TOKEN is not set to a token that may read it"
    except RevisionNotFoundError:
        told = "the data set has no such revision"
    except FileNotFoundError:
        raise ObjectNotFound(f"{uri} does not exist") from None
    except Exception as error:
        told = unsigned(" ".join(f"{type(error).__name__}: {error}".split()))[:300]
        if hub_is_away(error):
            raise StoreAway(f"{uri} can't be read from the Hugging Face Hub: {told}") from None
    else:
        return
    raise StorageError(f"{uri} can't be read from the Hugging Face Hub: {told}") from None
