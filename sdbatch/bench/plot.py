"""A plot of what a bench found."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

#: Of a row that is kept, of one that jobs could use, and of one that no job can.
_KEPT, _OTHER, _NEVER = "#1f5fa8", "#8ab8e6", "#d5d7db"


def draw_plot(found: dict[str, Any]) -> bytes:
    """A PNG: a bar a row, with its spread. Needs Matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a second to import, and not everybody has it
    from matplotlib.figure import Figure

    rows: Sequence[Mapping[str, Any]] = [row for row in found["rows"] if not row["lacking"]]
    figure = Figure(figsize=(10, 1.5 + 0.36 * len(rows)), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    rates = [row["images_a_second"] for row in rows]
    below = [max(row["images_a_second"] - row["from"], 0.0) for row in rows]
    above = [max(row["to"] - row["images_a_second"], 0.0) for row in rows]
    axes.barh(
        range(len(rows)),
        rates,
        xerr=[below, above],
        color=[_colour(row) for row in rows],
        error_kw={"ecolor": "#55585e", "elinewidth": 1, "capsize": 2},
    )
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("images/s (dark: kept; light: jobs can; grey: no job can)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{found['model']}, {found['width']}x{found['height']}, {found['steps']} steps, {found['dtype']}, "
        f"{found['hardware']}, torch {found['torch']}, {found['date']}",
        x=0.01,
        ha="left",
        fontsize=10,
        parse_math=False,
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _colour(row: Mapping[str, Any]) -> str:
    return _KEPT if row["kept"] else _OTHER if row["in_jobs"] else _NEVER
