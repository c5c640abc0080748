"""Fidelity as tables of text: for a terminal, for a model card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sdbatch.evaluation.fidelity import ATTRIBUTES, MEANING, Cell, Fidelity, Rate
from sdbatch.evaluation.prompts import CELLS

Show = Callable[[Rate], str]


@dataclass(frozen=True)
class Grid:
    """A title, the names of the columns, and the rows; the first ``labels`` columns say what a row is."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    labels: int = 1


def grids(fidelity: Fidelity, show: Show) -> list[Grid]:
    """Every attribute at the first setting; where there are several, then "all" at each of them."""
    setting, cells = next(iter(fidelity.settings.items()))
    names = [name for name in (*ATTRIBUTES, "shifted") if any(cell.rate(name) for cell in cells)]
    rows = [[name, *(_shown(cell, name, show) for cell in cells)] for name in names]
    rows.append(["pictures", *(f"{cell.n:,}" for cell in cells)])
    found = [Grid(str(setting), ["%", *(cell.label for cell in cells)], rows)]
    if len(fidelity.settings) > 1:
        rows = []
        for setting, held in fidelity.settings.items():
            by_name = {cell.name: cell for cell in held}
            varied = [setting.sampler, str(setting.num_inference_steps), f"{setting.guidance_scale:g}"]
            rows.append([*varied, *(_shown(by_name.get(name), "all", show) for name in CELLS)])
        columns = ["sampler", "steps", "guidance", *(name.replace("-", ", ") for name in CELLS)]
        found.append(Grid('"all" at every setting, %', columns, rows, labels=3))
    return found


def short(rate: Rate) -> str:
    """The share in per cent, its interval in whole ones: narrow enough for four in a terminal."""
    low, high = rate.interval
    share = "100" if rate.right == rate.n else f"{100 * rate.share:.1f}"
    return f"{share} ({100 * low:.0f}–{100 * high:.0f})"


def exact(rate: Rate) -> str:
    low, high = rate.interval
    return f"{100 * rate.share:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def markdown(fidelity: Fidelity) -> str:
    """The tables for a model card, with what their rows mean."""
    lines = []
    for grid in grids(fidelity, exact):
        rule = ["---"] * grid.labels + ["---:"] * (len(grid.columns) - grid.labels)
        lines += [f"**{grid.title}**", "", _line(grid.columns), _line(rule)]
        lines += [*(_line(row) for row in grid.rows), ""]
    told = "; ".join(f"*{name}*: {meaning}" for name, meaning in MEANING.items())
    lines += [f"Per cent of pictures that show what the prompt says, with 95 % confidence intervals. {told}.", ""]
    return "\n".join(lines)


def _shown(cell: Cell | None, name: str, show: Show) -> str:
    rate = cell.rate(name) if cell else None
    return show(rate) if rate else ""


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
