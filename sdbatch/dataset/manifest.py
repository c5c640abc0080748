"""What a target is taken for: told there before anything else is stored, so that nothing else gets into its way."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from sdbatch.dataset.where import Where
from sdbatch.errors import ObjectNotFound, OutputError
from sdbatch.ledger import find_job
from sdbatch.spec import Picture
from sdbatch.storage import Store

EXPORT_KEY = "_sdbatch/export.json"
#: What exports may have since; those that were begun before stand, and go on.
_ADDED = {"renditions", "signed"}


@dataclass(frozen=True)
class Manifest:
    """What a target holds: which job's pictures, which of them, in which form."""

    name: str
    fingerprint: str  # of the job's first part: extensions are exported, too
    format: str
    image: dict[str, Any] | None  # how pictures were encoded anew; None: they have the job's own bytes
    where: str | None
    renditions: bool = False  # and thumbnails, of the exported pictures
    signed: bool = False  # what is encoded anew is signed anew

    @property
    def picture(self) -> Picture | None:
        """How pictures are encoded anew."""
        return None if self.image is None else Picture.model_validate(self.image)

    @property
    def condition(self) -> Where | None:
        """Which rows are exported. Raises UsageError for a condition that says nothing."""
        return None if self.where is None else Where(self.where)

    @property
    def roots(self) -> list[str]:
        """Below what pictures and metadata lie."""
        return ["data/", "metadata/", *(("renditions/", "thumbnails/") if self.renditions else ())]

    def content(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {name: value for name, value in asdict(self).items() if name not in _ADDED or value}

    @property
    def sha256(self) -> str:
        """Commit records of this export carry it."""
        return hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()


def read_manifest(store: Store) -> Manifest | None:
    """What is exported to here, if anything."""
    try:
        return Manifest(**json.loads(store.get(EXPORT_KEY)))
    except ObjectNotFound:
        return None
    except (ValueError, TypeError) as error:
        raise OutputError(f"{store.uri}/{EXPORT_KEY} is damaged: {error}; export to an empty place") from None


def take(target: Store, manifest: Manifest) -> None:
    """Take the target for this export. Raises OutputError where it is not free."""
    standing = read_manifest(target)
    if standing is None:
        if find_job(target) is not None:
            raise OutputError(f"TARGET: {target.uri} is a job's output; export to an empty place")
        for root in manifest.roots:
            foreign = next(iter(target.list(root)), None)
            if foreign is not None:
                raise OutputError(f"TARGET: {target.uri} holds {foreign.key} but no export; export to an empty place")
        target.put_if_absent(EXPORT_KEY, json.dumps(manifest.content(), ensure_ascii=False, indent=2).encode())
        standing = read_manifest(target)
    if standing != manifest and standing is not None:
        there, here = asdict(standing), asdict(manifest)
        told = "; ".join(
            f"{name}: {there[name]} there, {here[name]} here" for name in there if there[name] != here[name]
        )
        raise OutputError(f"TARGET: {target.uri} holds another export ({told}); export to an empty place")
