"""What a report that is one file holds, read without a browser."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any


def read_report(path: Path) -> tuple[dict[str, Any], list[dict[str, str]], list[str]]:
    """Its summary, its rows, and the thumbnails of these in base64."""
    html = path.read_text(encoding="utf-8")
    data = dict(re.findall(r'<script type="application/json" id="(?:data-)?(\w+)">(.*?)</script>', html))
    summary = json.loads(data["summary"])
    rows, thumbnails = list[dict[str, str]](), list[str]()
    for name, count in summary["rows"]:
        content = json.loads(gzip.decompress(base64.b64decode(json.loads(data[name]))))
        columns = {column: cells * count if len(cells) == 1 else cells for column, cells in content["columns"]}
        columns |= {f"other {column}": cells * (count if len(cells) == 1 else 1) for column, cells in content["others"]}
        rows += [{column: cells[i] for column, cells in columns.items()} for i in range(count)]
    for name, _ in summary["packs"]:
        thumbnails += json.loads(data[name])
    return summary, rows, thumbnails
