"""Commands that take an output: verify, errors, retry, repair, duplicates, report, remake."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from sdbatch import dataset, ledger
from sdbatch.cli.console import bar, facts, plain, print_json, size, tell, watching
from sdbatch.cli.jobs import report_outcome
from sdbatch.errors import OutputError, StorageError, UsageError
from sdbatch.outputs import opens, read_pictures, read_stored
from sdbatch.report import write_report
from sdbatch.storage import Store, open_store

Output = Annotated[str, typer.Argument(metavar="OUTPUT", help="The output of a job: a folder or s3://bucket/prefix.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Here = Annotated[
    list[str],
    typer.Option("--set", metavar="FIELD=VALUE", help="Where something lies now: input.uri=/data/prompts.csv."),
]

_SHOWN = 20


def verify(
    output: Output,
    sample: Annotated[float, typer.Option(min=0.0, max=1.0, help="Read only this fraction of the shards.")] = 1.0,
    recompute: Annotated[int, typer.Option(min=0, help="Make so many images again and compare their bytes.")] = 0,
    set_: Here = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Prove from the stored bytes that every planned image ended exactly once."""
    store = open_output(output)
    if set_ and not recompute:
        raise UsageError("--set: is for images that are made again; add --recompute")
    exported = dataset.read_manifest(store)
    if exported is not None and (sample < 1 or recompute):
        raise UsageError(
            "--sample and --recompute: an export has no plan to choose from and make again; leave them out"
        )
    with bar("verifying") as update:

        def progress(done: int, total: int) -> None:
            update(done, total, "shards")

        if exported is not None:
            verdict = dataset.verify_export(store, exported, read_stored, opens, progress)
        else:
            verdict = ledger.verify(store, read_stored, opens, progress, sample=sample)
    made_again = None
    if recompute:
        from sdbatch.engine.recompute import recompute as make_again  # Ray and torch take seconds to import

        with bar("making again") as update:
            made_again = make_again(store, recompute, set_, lambda done, total: update(done, total, "images"))
    ok = verdict.ok and (made_again is None or not made_again.different)
    if as_json:
        again = {} if made_again is None else {"recomputed": made_again.same, "different": made_again.different}
        print_json({"ok": ok, **asdict(verdict), **again})
    else:
        mark = "[green]✓[/]" if verdict.ok else "[red]✗[/]"
        ended = verdict.committed + verdict.quarantined
        what = "exported pictures are there" if exported else "planned images ended exactly once"
        tell(f"{mark} {ended:,} of {verdict.planned:,} {what}")
        facts({"committed": f"{verdict.committed:,}", "quarantined": f"{verdict.quarantined:,}"})
        if sample < 1:
            facts({"read": f"{verdict.checked:,} images; of the others only the records"})
        for name in ("missing", "doubled", "altered", "leftover", "extra"):
            found: list[str] = getattr(verdict, name)
            if found:
                tell(f"  [red]{len(found):,} {name}[/]: {_several(found)}")
        if verdict.missing or verdict.altered or verdict.leftover:
            mended = "exporting once more, to an empty place" if exported else f"sdbatch repair {escape(store.uri)}"
            tell(f"  mended by: {mended}")
        if made_again is not None:
            mark = "[red]✗[/]" if made_again.different else "[green]✓[/]"
            made = made_again.same + len(made_again.different)
            tell(f"{mark} {made_again.same:,} of {made:,} images made again have the same {made_again.by}")
            if made < recompute:
                tell(f"  of {recompute:,} asked for: a shard gives no more than its part, and none once it was mended")
            if made_again.different:
                tell(f"  [red]{len(made_again.different):,} differ[/]: {_several(made_again.different)}")
    if not ok:
        raise typer.Exit(1)


def retry(
    output: Output,
    set_: Annotated[
        list[str],
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="Make them otherwise: model.dtype=float32, resources.actors=2."
        ),
    ] = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Run the quarantined requests again, with the same seeds."""
    from sdbatch.engine.mending import deciding_of
    from sdbatch.engine.mending import retry as make_again

    store = open_output(output)
    with watching() as watch:
        outcome = make_again(store, set_, watch)
    if outcome.status.dropped and not deciding_of(set_) and not as_json:
        left = f"{outcome.status.dropped:,} pictures that checks dropped were left: their seeds would give them again"
        tell(f"{left}; [bold]--set checks.…[/] makes them by other rules")
    report_outcome(outcome, as_json=as_json)


def repair(output: Output, set_: Here = [], as_json: Json = False) -> None:  # noqa: B006
    """Make again what 'verify' finds missing or altered."""
    from sdbatch.engine.mending import repair as make_again

    store = open_output(output)
    with watching() as watch, bar("verifying") as update:
        outcome = make_again(store, set_, watch, lambda done, total: update(done, total, "shards"))
    report_outcome(outcome, as_json=as_json)


def errors(output: Output, as_json: Json = False) -> None:
    """List the quarantined requests, each with its error."""
    found = ledger.failures(open_output(output))
    if as_json:
        print_json(found)
        return
    tell(f"{len(found):,} quarantined" if found else "[green]✓[/] nothing is quarantined")
    for failure in found:
        tell(f"  [bold]{plain(failure['image_id'])}[/]  {plain(failure['error'])}")


def duplicates(
    output: Output,
    max_distance: Annotated[
        int | None,
        typer.Option(min=0, max=31, help="Bits in which hashes may differ; as the job has it when left out."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List pictures that look like one before them, over the whole job, by the hashes of checks.near_duplicates."""
    from sdbatch.engine.duplicates import find_duplicates

    store = open_output(output)
    with bar("reading hashes") as update:
        found = find_duplicates(store, max_distance, lambda done, total: update(done, total, "shards"))
    if as_json:
        print_json([asdict(one) for one in found])
        return
    tell(f"{len(found):,} pictures look like one before them" if found else "[green]✓[/] no two pictures look alike")
    for one in found[:_SHOWN]:
        bits = f"{one.distance} bits" if one.distance else "no bit"
        tell(f"  [bold]{plain(one.image_id)}[/]  like {plain(one.duplicate_of)}, {bits} apart")
    if len(found) > _SHOWN:
        tell(f"  and {len(found) - _SHOWN:,} more: --json lists them all")


def report(
    output: Output,
    limit: Annotated[int, typer.Option(min=1, help="Show at most this many images.")] = 100_000,
    as_json: Json = False,
) -> None:
    """Write one page on the job: progress, failures, scores, and its pictures to search and look through."""
    with bar("thumbnails") as update:
        page = write_report(
            open_output(output), read_pictures, limit, lambda done, total: update(done, total, "images")
        )
    if as_json:
        print_json(page)
        return
    tell(f"[green]✓[/] {page.shown:,} images on one page of {size(page.bytes)}: {plain(page.uri)}")
    if page.files:
        tell(f"  beside it {page.files:,} files of {size(page.files_bytes)}, in report/")


def remake(
    output: Output,
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="Its image_id, or SHARD/POSITION.")],
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="Where the picture is written.")],
    set_: Here = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Make one picture again, as it was planned, and compare its bytes with the stored ones."""
    if to.is_dir() or not to.absolute().parent.is_dir():
        raise UsageError(f"--to: {plain(str(to))} should name a file in a folder that is there")
    from sdbatch.engine.remake import remake as make_again  # Ray and torch take seconds to import

    found = make_again(open_output(output), image, set_)
    try:
        to.write_bytes(found.data)
    except OSError as error:
        raise UsageError(f"--to: {plain(str(to))} can't be written: {error.strerror}") from None
    if as_json:
        print_json({"image_id": found.image_id, "file": str(to), "same": found.same, "differs": list(found.differs)})
    elif found.same:
        tell(f"[green]✓[/] {plain(found.image_id)} is made again, with the stored bytes: {plain(str(to))}")
    else:
        tell(f"[red]✗[/] {plain(found.image_id)} is made again, and its bytes are others: {plain(str(to))}")
        tell(*(f"  {plain(line)}" for line in found.differs))
    if not found.same:
        raise typer.Exit(1)


def open_output(output: str) -> Store:
    """The store of a job's output. Raises OutputError."""
    try:
        return open_store(output)
    except StorageError as error:
        raise OutputError(str(error)) from None


def _several(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return f"{plain(', '.join(names[:_SHOWN]))}{more}"
