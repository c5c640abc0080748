"""A contact sheet: the first pictures of each cell, unselected, wrong ones in a red frame."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

from PIL import Image, ImageDraw, ImageFont

from sdbatch.evaluation.fidelity import Reading
from sdbatch.evaluation.prompts import CELLS
from sdbatch.storage import Store

Read = Callable[[Store, Iterable[str]], dict[str, bytes]]

_COLUMNS, _PER_CELL = 8, 16
_PICTURE, _GAP, _HEAD, _WORDS = 144, 12, 34, 58  # pixels: of a picture, between two, above a cell, under a picture
_LINES, _LETTERS = 4, 27
_INK, _FAINT, _EDGE, _WRONG = (30, 30, 34), (96, 98, 104), (222, 224, 228), (214, 32, 32)


def draw_sheet(store: Store, readings: Sequence[Reading], read_pictures: Read) -> bytes:
    """A PNG of the first 16 pictures of each cell at the first setting, with their prompts.

    ``readings`` come in the order of the plan; ``read_pictures`` finds pictures by their paths.
    """
    first = [reading for reading in readings if reading.setting == readings[0].setting]
    cells = {name: list(islice((r for r in first if r.cell == name), _PER_CELL)) for name in CELLS}
    cells = {name: shown for name, shown in cells.items() if shown}
    pictures = read_pictures(store, [reading.path for shown in cells.values() for reading in shown])
    rows = sum(-(-len(shown) // _COLUMNS) for shown in cells.values())
    size = (
        _COLUMNS * (_PICTURE + _GAP) + _GAP,
        _GAP + len(cells) * _HEAD + rows * (_PICTURE + _WORDS),
    )
    sheet = Image.new("RGB", size, (255, 255, 255))
    pen, heading, words = ImageDraw.Draw(sheet), ImageFont.load_default(16), ImageFont.load_default(10)
    top = _GAP
    for name, shown in cells.items():
        right = sum(reading.agreement.all for reading in shown)
        title = f"{name.replace('-', ', ')}: {right} of these {len(shown)} show what was asked for"
        pen.text((_GAP, top), title, _INK, heading)
        top += _HEAD
        for start in range(0, len(shown), _COLUMNS):
            for column, reading in enumerate(shown[start : start + _COLUMNS]):
                left = _GAP + column * (_PICTURE + _GAP)
                with Image.open(io.BytesIO(pictures[reading.path])) as picture:
                    sheet.paste(picture.convert("RGB").resize((_PICTURE, _PICTURE)), (left, top))
                pen.rectangle((left, top, left + _PICTURE - 1, top + _PICTURE - 1), outline=_EDGE)
                if not reading.agreement.all:
                    frame = (left - 3, top - 3, left + _PICTURE + 2, top + _PICTURE + 2)
                    pen.rectangle(frame, outline=_WRONG, width=2)
                prompt = textwrap.wrap(reading.prompt, _LETTERS, max_lines=_LINES, placeholder=" …")
                pen.multiline_text((left, top + _PICTURE + 5), "\n".join(prompt), _FAINT, words, spacing=1)
            top += _PICTURE + _WORDS
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
