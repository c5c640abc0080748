"""The data card, ``README.md``: what a data set holds, in words for people and in front matter for libraries.

It opens by ``datasets.load_dataset`` as it stands: the front matter names its files, and its features where the files
don't tell them (https://huggingface.co/docs/hub/datasets-cards).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import yaml

from sdbatch.dataset.columns import meaning
from sdbatch.errors import ObjectNotFound
from sdbatch.outputs import dtype
from sdbatch.storage import Store

CARD_KEY = "README.md"
_MARK = "<!-- sdbatch wrote this card, and renews it as long as nobody else has changed it: "
_SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
#: Columns that only the metadata table has: they tell of storing, which the data set's own files do not.
_STORING = ("path", "bytes", "sha256", "status", "error")


@dataclass(frozen=True)
class Card:
    """What is told. ``columns`` are the metadata table's; ``facts`` further lines of what it was made with."""

    name: str
    license: str | None
    format: str  # images, webdataset or parquet
    ending: str  # of a picture: png, jpeg or webp
    images: int
    bytes: int
    model: str
    model_sha256: str
    columns: pa.Schema
    kept: tuple[str, ...]
    facts: Mapping[str, str]
    counts: Mapping[str, int] = field(default_factory=dict)  # beside the images: what → how many
    copies: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # folder → what it holds, its pictures' ending


def write_card(store: Store, card: Card) -> bool:
    """Write the card, unless somebody else's stands there, or a folder, or ours with changes; False then."""
    try:
        standing = store.get(CARD_KEY)
    except ObjectNotFound:
        standing = None
        if any(True for _ in store.list(f"{CARD_KEY}/")):
            return False
    data = card_text(card).encode()
    if standing is not None and not _ours(standing):
        return False
    if standing != data:
        store.put(CARD_KEY, data)
    return True


def card_text(card: Card) -> str:
    lines = [
        "---",
        yaml.safe_dump(_front_matter(card), sort_keys=False, allow_unicode=True, width=120).strip(),
        "---",
        "",
        f"# {card.name}",
        "",
        f"{card.images:,} synthetic pictures with their prompts, drawn by the text-to-image model {code(card.model)}.",
        "",
        *_table(("", ""), [(what, f"{count:,}") for what, count in _counts(card).items()]),
        "",
        "## How to open it",
        "",
        "```python",
        *_LOADING[card.format].splitlines(),
        "```",
        "",
        "## How it was made",
        "",
        *_table(("", ""), [("model", code(card.model)), ("its sha256", code(card.model_sha256))]),
        *(f"| {what} | {told} |" for what, told in card.facts.items()),
        "",
        "Every picture is synthetic and says so itself: its XMP has the IPTC digital source type "
        "`trainedAlgorithmicMedia`, the model, the prompt and the seed. The same request gives the same picture.",
        "",
        *_copies(card),
        "## Columns",
        "",
        _FILES[card.format].format(ending=card.ending),
        "`metadata/` has the whole table, also of what could not be made:",
        "",
        *_table(
            ("column", "type", "meaning"),
            [
                (
                    code(one.name),
                    _told(one.type),
                    _cell(meaning(one.name, card.kept)),
                )
                for one in card.columns
            ],
        ),
        "",
        "## Licence",
        "",
        f"{code(card.license)}, as whoever made this data set has set it."
        if card.license
        else "Nobody has set one (`output.license` in the job spec). The model's own licence may bind what it makes.",
        "",
    ]
    text = "\n".join(lines)
    return f"{text}\n{_MARK}{_digest(text)} -->\n"


_LOADING = {
    "images": """from datasets import load_dataset

pictures = load_dataset("path/to/this/folder", split="train")  # image, prompt, seed, …

import pyarrow.dataset

table = pyarrow.dataset.dataset("path/to/this/folder/metadata")  # without the pictures""",
    "parquet": """from datasets import load_dataset

pictures = load_dataset("path/to/this/folder", split="train")  # image, prompt, seed, …

import pyarrow.dataset

pictures = pyarrow.dataset.dataset("path/to/this/folder/data")  # bytes of pictures in image.bytes
table = pyarrow.dataset.dataset("path/to/this/folder/metadata")  # without the pictures""",
    "webdataset": """import glob

import webdataset

shards = sorted(glob.glob("path/to/this/folder/data/*.tar"))
pictures = webdataset.WebDataset(shards, shardshuffle=False).decode("pil")  # pictures, json, txt

from datasets import load_dataset

pictures = load_dataset("path/to/this/folder", split="train", streaming=True)""",
}
_FILES = {
    "images": "`data/SHARD/` has {ending} files, and `metadata.parquet`, which names and describes them.",
    "parquet": "`data/SHARD.parquet` has the picture in `image`, and what describes it.",
    "webdataset": "`data/SHARD.tar` has three files a picture: KEY.{ending}, KEY.json with what describes it, KEY.txt "
    "with the prompt.",
}


def _front_matter(card: Card) -> dict[str, Any]:
    front: dict[str, Any] = {
        "pretty_name": card.name,
        "license": card.license or "unknown",
        "task_categories": ["text-to-image"],
        "size_categories": [_size_category(card.images)],
        "tags": ["synthetic", "ai-generated", "diffusion", "sdbatch"],
    }
    if not card.images:
        return front
    endings = {"data": card.ending, **{folder: ending for folder, (_, ending) in card.copies.items()}}
    names = {folder: "default" if folder == "data" else folder.rpartition("/")[2] for folder in endings}
    files = {"images": "**", "parquet": "*.parquet", "webdataset": "*.tar"}[card.format]
    front["configs"] = [
        {
            "config_name": name,
            "data_files": [{"split": "train", "path": f"{folder}/{files}"}],
            **({"default": True} if folder == "data" else {}),
        }
        for folder, name in names.items()
    ]
    if card.format == "webdataset":  # a null in the first rows would otherwise decide what all others are
        front["dataset_info"] = [
            {"config_name": names[folder], "features": _features(card, ending)} for folder, ending in endings.items()
        ]
    return front


def _features(card: Card, ending: str) -> list[dict[str, Any]]:
    """What a tar's files hold."""
    described = [{"name": one.name, **_type(one.type)} for one in card.columns if one.name not in _STORING]
    return [
        {"name": ending, "dtype": "image"},
        {"name": "json", "struct": described},
        *({"name": name, "dtype": "string"} for name in ("txt", "__key__", "__url__")),
    ]


def _copies(card: Card) -> list[str]:
    """What there is of every picture once more."""
    if not card.copies:
        return []
    rows = [(code(f"{folder}/"), code(folder.rpartition("/")[2]), what) for folder, (what, _) in card.copies.items()]
    return ["## Other sizes", "", *_table(("folder", "configuration", "every picture once more"), rows), ""]


def _type(kind: pa.DataType) -> dict[str, str]:
    return {"sequence": dtype(kind.value_type)} if pa.types.is_list(kind) else {"dtype": dtype(kind)}


def _told(kind: pa.DataType) -> str:
    return f"list of {dtype(kind.value_type)}" if pa.types.is_list(kind) else dtype(kind)


def _counts(card: Card) -> dict[str, int]:
    return {"pictures": card.images, **card.counts, "bytes of pictures": card.bytes}


def _size_category(images: int) -> str:
    """As the Hub counts: ``n<1K``, ``1K<n<10K``, …"""
    place = 0
    while place < len(_SIZES) and images >= 10 ** (3 + place):
        place += 1
    if place == 0:
        return f"n<{_SIZES[0]}"
    return f"n>{_SIZES[-1]}" if place == len(_SIZES) else f"{_SIZES[place - 1]}<n<{_SIZES[place]}"


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads), *(f"| {' | '.join(row)} |" for row in rows)]


def code(text: str) -> str:
    """Text that is not ours as code in a cell."""
    return f"`{_cell(text).replace('`', chr(39))}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _ours(card: bytes) -> bool:
    """Did we write this, and has nobody changed it since?"""
    text, mark, told = card.decode("utf-8", "replace").rpartition(f"\n{_MARK}")
    return bool(mark) and told == f"{_digest(text)} -->\n"
