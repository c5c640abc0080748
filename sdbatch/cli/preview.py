"""Image requests as a person reads them before they are made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from sdbatch.cli.console import people, plain, tell

if TYPE_CHECKING:
    from sdbatch.prompts import ImageRequest

_NUMBERS = {"size", "seed", "steps", "guidance"}


def described(request: ImageRequest) -> dict[str, Any]:
    """A request for machines, under the names that the metadata have."""
    return {
        "image_id": request.image_id,
        "row_id": request.row_id,
        "prompt": request.prompt,
        "template": request.template,
        "negative_prompt": request.negative_prompt,
        "seed": request.seed,
        "width": request.width,
        "height": request.height,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "sampler": request.sampler,
        "strength": request.strength,
        "error": request.fault,
        **request.kept,
    }


def tell_requests(requests: Sequence[ImageRequest]) -> None:
    """A table on a terminal, a line each elsewhere."""
    rows = [_cells(request) for request in requests]
    if not people.is_terminal:
        for request, cells in zip(requests, rows, strict=True):
            words = {"seed": "seed {}", "steps": "{} steps", "guidance": "guidance {}"}
            said = [words.get(name, "{}").format(cell) for name, cell in cells.items()]
            tell("  ".join(said if request.fault is None else (cells["id"], cells["prompt"])))
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in rows[0] if rows else ():
        table.add_column(name, justify="right" if name in _NUMBERS else "left", overflow="fold")
    for cells in rows:
        table.add_row(*cells.values())
    people.print(table, "")


def _cells(request: ImageRequest) -> dict[str, str]:
    prompt = plain(request.prompt) if request.fault is None else f"[red]refused[/]: {plain(request.fault)}"
    return {
        "id": plain(request.image_id),
        "size": f"{request.width}x{request.height}",
        "seed": str(request.seed),
        "steps": str(request.num_inference_steps),
        "guidance": f"{request.guidance_scale:g}",
        "sampler": request.sampler,
        "prompt": prompt,
    }
