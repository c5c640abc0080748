"""What a folder's training state was made from: state of one training is never taken for that of another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdbatch.errors import UsageError


def claim(folder: Path, made_from: Mapping[str, Any]) -> None:
    """Write down in ``folder`` what the training is made from; where there is state already, check that it is the same.

    Raises UsageError naming what differs.
    """
    path = folder / "training.json"
    now = json.loads(json.dumps(made_from))
    if not path.is_file() or not list(folder.glob("*.safetensors")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")
        return
    try:
        then = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} can't be read: {error}; train into another folder") from None
    changed = [
        f"{key} was {then.get(key)}, is {now.get(key)}" for key in {**then, **now} if then.get(key) != now.get(key)
    ]
    if changed:
        raise UsageError(f"{folder} holds another training: {'; '.join(changed)}; change it back or use another folder")
