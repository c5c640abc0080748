"""Fidelity as a figure: bars by attribute, and, where there are several settings, a line over them."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from sdbatch.evaluation.fidelity import ATTRIBUTES, Cell, Fidelity, Rate
from sdbatch.evaluation.prompts import CELLS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {"one-seen": "#1f5fa8", "one-novel": "#8ab8e6", "two-seen": "#c2570c", "two-novel": "#f5b27a"}
_GREY = "#55585e"
_ASIDE = 0.08  # between the whiskers of two cells


def draw_plot(fidelity: Fidelity, title: str) -> bytes:
    """A PNG: every attribute at the first setting, then "all" over the settings; whiskers are 95 % intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes a second to import
    from matplotlib.figure import Figure

    several = len(fidelity.settings) > 1
    width = max(10.0, 0.9 * len(fidelity.settings))
    figure = Figure(figsize=(width, 9.5 if several else 4.8), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", parse_math=False)
    panels = figure.subplots(2 if several else 1, 1, squeeze=False)[:, 0]
    _bars(panels[0], fidelity)
    if several:
        _lines(panels[1], fidelity)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _bars(axes: Axes, fidelity: Fidelity) -> None:
    setting, cells = next(iter(fidelity.settings.items()))
    names = [name for name in (*ATTRIBUTES, "shifted") if any(cell.rate(name) for cell in cells)]
    width = 0.8 / len(CELLS)
    for cell in cells:
        places: list[float] = []
        rates: list[Rate] = []
        for at, name in enumerate(names):
            if (rate := cell.rate(name)) is not None:
                beside = [other.name for other in cells if other.rate(name)]  # their middle is the attribute's
                places.append(at + (beside.index(cell.name) - (len(beside) - 1) / 2) * width)
                rates.append(rate)
        axes.bar(
            places,
            [100 * rate.share for rate in rates],
            width * 0.92,
            yerr=_whiskers(rates),
            color=_COLOURS[cell.name],
            label=f"{cell.label} ({cell.n:,} pictures)",
            error_kw={"ecolor": _GREY, "elinewidth": 1, "capsize": 2},
        )
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.6, len(names) - 0.4)
    _dress(axes, str(setting), len(cells))


def _lines(axes: Axes, fidelity: Fidelity) -> None:
    settings = list(fidelity.settings)
    for aside, name in enumerate(CELLS):
        found: list[tuple[int, Cell]] = [
            (at, cell) for at, cells in enumerate(fidelity.settings.values()) for cell in cells if cell.name == name
        ]
        if not found:
            continue
        rates = [cell.rates["all"] for _, cell in found]
        axes.errorbar(
            [at + (aside - (len(CELLS) - 1) / 2) * _ASIDE for at, _ in found],
            [100 * rate.share for rate in rates],
            yerr=_whiskers(rates),
            color=_COLOURS[name],
            marker="o" if CELLS[name][0] == 1 else "s",
            markersize=5,
            linewidth=1.4,
            elinewidth=1,
            capsize=2,
            label=found[0][1].label,
        )
    labels = [f"{s.sampler}\n{s.num_inference_steps} steps\nguidance {s.guidance_scale:g}" for s in settings]
    axes.set_xticks(range(len(settings)), labels, fontsize=8)
    axes.set_xlim(-0.5, len(settings) - 0.5)
    _dress(axes, '"all" at every setting', len(CELLS))


def _dress(axes: Axes, title: str, columns: int) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=_GREY, pad=26)
    axes.set_ylabel("pictures that show it, %")
    axes.set_ylim(0, 102)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#e3e5e8")
    axes.tick_params(length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=columns, frameon=False, fontsize=9)


def _whiskers(rates: list[Rate]) -> list[list[float]]:
    """How far each interval reaches below and above its share, in per cent."""
    below = [100 * (rate.share - rate.interval[0]) for rate in rates]
    above = [100 * (rate.interval[1] - rate.share) for rate in rates]
    return [below, above]
