"""What stored pictures show, without what is written in them: their bytes also tell which job made them."""

from __future__ import annotations

import hashlib
import io

from PIL import Image

from sdbatch.ledger import Commits
from sdbatch.outputs import decode_metadata, read_pictures
from sdbatch.storage import Store


def drawn(store: Store) -> dict[str, str]:
    """Image id → sha256 of the picture's pixels, of all that are committed."""
    paths = {
        row["image_id"]: row["path"]
        for record in Commits(store).newest()
        for row in decode_metadata(store.get(record.metadata_key))
        if row["path"]
    }
    data = read_pictures(store, paths.values())
    return {
        name: hashlib.sha256(Image.open(io.BytesIO(data[path])).tobytes()).hexdigest() for name, path in paths.items()
    }
