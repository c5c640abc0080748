"""How well a text-to-image model draws what its prompts say, measured in the drawn world of ``sdbatch.training``.

Prompts that name shapes, colours, sizes and places are made into pictures by an ordinary job; each picture is read
back by image analysis and held against its prompt. Importing this raises UsageError without the extra "training".
"""

from __future__ import annotations

from importlib.util import find_spec

from sdbatch.errors import UsageError

for package in ("matplotlib", "scipy"):
    if find_spec(package) is None:
        raise UsageError(f"evaluating needs {package}, which is not installed; run: pip install 'sdbatch[training]'")
