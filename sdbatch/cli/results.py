"""Commands that take an output: status, verify, errors, retry, repair, gallery."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.markup import escape

from sdbatch import ledger, report
from sdbatch.cli.console import bar, facts, plain, print_json, tell, watching
from sdbatch.cli.jobs import Set, report_outcome
from sdbatch.errors import OutputError, StorageError
from sdbatch.outputs import opens, read_pictures, read_stored
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
    tell(f"[bold]{plain(found.name)}[/] is {found.state}")
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


def verify(
    output: Output,
    sample: Annotated[float, typer.Option(min=0.0, max=1.0, help="Read only this fraction of the shards.")] = 1.0,
    recompute: Annotated[int, typer.Option(min=0, help="Make so many images again and compare their bytes.")] = 0,
    as_json: Json = False,
) -> None:
    """Prove from the stored bytes that every planned image ended exactly once."""
    store = _open(output)
    with bar("verifying") as update:
        verdict = ledger.verify(
            store, read_stored, opens, lambda done, total: update(done, total, "shards"), sample=sample
        )
    made_again = None
    if recompute:
        from sdbatch.engine.recompute import recompute as make_again  # Ray and torch take seconds to import

        with bar("making again") as update:
            made_again = make_again(store, recompute, lambda done, total: update(done, total, "images"))
    ok = verdict.ok and (made_again is None or not made_again.different)
    if as_json:
        again = {} if made_again is None else {"recomputed": made_again.same, "different": made_again.different}
        print_json({"ok": ok, **asdict(verdict), **again})
    else:
        mark = "[green]✓[/]" if verdict.ok else "[red]✗[/]"
        ended = verdict.committed + verdict.quarantined
        tell(f"{mark} {ended:,} of {verdict.planned:,} planned images ended exactly once")
        facts({"committed": f"{verdict.committed:,}", "quarantined": f"{verdict.quarantined:,}"})
        if sample < 1:
            facts({"read": f"{verdict.checked:,} images; of the others only the records"})
        for name in ("missing", "doubled", "altered", "leftover", "extra"):
            found: list[str] = getattr(verdict, name)
            if found:
                tell(f"  [red]{len(found):,} {name}[/]: {_several(found)}")
        if verdict.missing or verdict.altered or verdict.leftover:
            tell(f"  mended by: sdbatch repair {escape(store.uri)}")
        if made_again is not None:
            mark = "[red]✗[/]" if made_again.different else "[green]✓[/]"
            tell(f"{mark} {made_again.same:,} of {recompute:,} images made again have the same {made_again.by}")
            if made_again.different:
                tell(f"  [red]{len(made_again.different):,} differ[/]: {_several(made_again.different)}")
    if not ok:
        raise typer.Exit(1)


def retry(output: Output, set_: Set = [], as_json: Json = False) -> None:  # noqa: B006
    """Run the quarantined requests again, with the same seeds."""
    from sdbatch.engine.mending import retry as make_again

    store = _open(output)
    with watching() as watch:
        outcome = make_again(store, set_, watch)
    report_outcome(outcome, as_json=as_json)


def repair(output: Output, as_json: Json = False) -> None:
    """Make again what 'verify' finds missing or altered."""
    from sdbatch.engine.mending import repair as make_again

    store = _open(output)
    with watching() as watch, bar("verifying") as update:
        outcome = make_again(store, watch, lambda done, total: update(done, total, "shards"))
    report_outcome(outcome, as_json=as_json)


def errors(output: Output, as_json: Json = False) -> None:
    """List the quarantined requests, each with its error."""
    found = ledger.failures(_open(output))
    if as_json:
        print_json(found)
        return
    tell(f"{len(found):,} quarantined" if found else "[green]✓[/] nothing is quarantined")
    for failure in found:
        tell(f"  [bold]{plain(failure['image_id'])}[/]  {plain(failure['error'])}")


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
    tell(f"[green]✓[/] {page.shown:,} of {page.committed:,} pictures on one page: {plain(page.uri)}")


def _open(output: str) -> Store:
    try:
        return open_store(output)
    except StorageError as error:
        raise OutputError(str(error)) from None


def _several(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return f"{plain(', '.join(names[:_SHOWN]))}{more}"
