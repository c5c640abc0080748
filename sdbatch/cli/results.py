"""Commands that take an output: status, verify, errors, gallery."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.markup import escape

from sdbatch import ledger, report
from sdbatch.cli.console import bar, facts, print_json, tell
from sdbatch.errors import OutputError, StorageError
from sdbatch.outputs import read_pictures
from sdbatch.storage import Store, open_store

Output = Annotated[str, typer.Argument(metavar="OUTPUT", help="The output of a job: a folder or s3://bucket/prefix.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]

_SHOWN = 20


def status(output: Output, as_json: Json = False) -> None:
    """Tell how far a job is."""
    found = ledger.read_status(_open(output))
    if as_json:
        print_json({**asdict(found), "remaining": found.remaining})
        return
    tell(f"[bold]{found.name}[/] is {found.state}")
    facts(
        {
            "planned": f"{found.planned:,}",
            "committed": f"{found.committed:,}",
            "quarantined": f"[red]{found.quarantined:,}[/]" if found.quarantined else "0",
            "remaining": f"{found.remaining:,}",
            "shards": f"{found.shards_committed:,} of {found.shards:,}",
            "size": f"{found.bytes / 1e6:,.1f} MB",
        }
    )


def verify(output: Output, as_json: Json = False) -> None:
    """Prove from the stored bytes that every planned image ended exactly once."""
    store = _open(output)
    with bar("verifying") as update:
        verdict = ledger.verify(store, read_pictures, lambda done, total: update(done, total, "shards"))
    if as_json:
        print_json({"ok": verdict.ok, **asdict(verdict)})
    else:
        mark = "[green]✓[/]" if verdict.ok else "[red]✗[/]"
        ended = verdict.committed + verdict.quarantined
        tell(f"{mark} {ended:,} of {verdict.planned:,} planned images ended exactly once")
        facts({"committed": f"{verdict.committed:,}", "quarantined": f"{verdict.quarantined:,}"})
        for name in ("missing", "doubled", "altered", "extra"):
            found: list[str] = getattr(verdict, name)
            if found:
                more = f" and {len(found) - _SHOWN:,} more" if len(found) > _SHOWN else ""
                tell(f"  [red]{len(found):,} {name}[/]: {_plain(', '.join(found[:_SHOWN]))}{more}")
    if not verdict.ok:
        raise typer.Exit(1)


def errors(output: Output, as_json: Json = False) -> None:
    """List the quarantined requests, each with its error."""
    found = ledger.failures(_open(output))
    if as_json:
        print_json(found)
        return
    tell(f"{len(found):,} quarantined" if found else "[green]✓[/] nothing is quarantined")
    for failure in found:
        tell(f"  [bold]{_plain(failure['image_id'])}[/]  {_plain(failure['error'])}")


def gallery(
    output: Output,
    limit: Annotated[int, typer.Option(min=1, help="Show at most this many pictures.")] = 500,
    as_json: Json = False,
) -> None:
    """Write one page with the pictures, their prompts and parameters."""
    page = report.write_gallery(_open(output), read_pictures, limit)
    if as_json:
        print_json(page)
        return
    tell(f"[green]✓[/] {page.shown:,} of {page.committed:,} pictures on one page: {_plain(page.uri)}")


def _open(output: str) -> Store:
    try:
        return open_store(output)
    except StorageError as error:
        raise OutputError(str(error)) from None


def _plain(text: str) -> str:
    """Text of a user's, harmless in a terminal: no markup, no control characters."""
    return escape("".join(char if char.isprintable() else "�" for char in text))
