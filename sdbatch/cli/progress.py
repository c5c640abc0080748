"""Commands that tell how far a job is: status, watch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sdbatch import ledger
from sdbatch.cli.console import of_checks, people, plain, print_json, size, span, tell
from sdbatch.cli.results import Json, Output, open_output
from sdbatch.errors import Interrupted, OutputError
from sdbatch.ledger import DEAD, Driver, Progress, Status

_REASONS, _ACTORS = 8, 16
_WIDTH = 72  # of the bar, at most
#: What a driver is at, in words; by its stage.
_STAGES = {
    "starting": "is being started",
    "waiting": "is held up",
    "planning": "is being planned",
    "loading": "has its model loaded",
    "making": "is being made",
    "done": "is being finished",
}


def status(output: Output, as_json: Json = False) -> None:
    """Tell how far a job is, how fast it goes, what failed and who is at work."""
    found = ledger.read_progress(open_output(output))
    if as_json:
        left = found.seconds_left
        print_json(
            {
                **asdict(found.status),
                "remaining": found.status.remaining,
                "images_per_second": found.images_per_second,
                "seconds_left": None if left is None else round(left, 1),
                "reasons": dict(found.reasons),
                "driver": None if found.driver is None else asdict(found.driver),
            }
        )
        return
    people.print(_view(found))


def watch(
    output: Output,
    every: Annotated[float, typer.Option(min=0.2, max=3600, help="Seconds between two looks.")] = 2.0,
) -> None:
    """Watch a job from any machine until it ends; exits as the job does."""
    store = open_output(output)
    looks = _looks(lambda: ledger.read_progress(store), every)
    try:
        if people.is_terminal:
            with Live(console=people, auto_refresh=False) as live:
                for found in looks:
                    live.update(_view(found), refresh=True)
        else:
            said = ""
            for found in looks:
                if (line := _line(found)) != said:
                    tell(said := line)
    except (Interrupted, KeyboardInterrupt):
        raise Interrupted("this was only watching: the job goes on") from None
    if found.status.state != "complete":
        tell("[yellow]nobody is at work on it any more[/]; the command that started it goes on from here")
        raise typer.Exit(1)
    if found.status.failed:
        raise typer.Exit(3)


def _looks(read: Any, every: float) -> Iterator[Progress]:
    """One look after the other, until the job is complete or nobody is at work on it."""
    beat, alive_at, met = None, time.monotonic(), False
    found: Progress | None = None
    while True:
        try:
            found = read()
        except OutputError:  # where its driver ended before there was a plan, there is nothing more to see
            if found is None or found.status.state != "planning":
                raise
            return
        now = found.driver and (found.driver.host, found.driver.pid, found.driver.now)
        # Whose heart beats is alive, whatever the two machines' clocks say.
        alive = found.at_work or (found.driver is not None and found.driver.state == "silent" and now != beat)
        yield found
        if alive:
            beat, alive_at, met = now, time.monotonic(), True
        gone = met and (found.driver is None or found.driver.state in {"ended", "dead"})
        if found.status.state == "complete" and not found.at_work:
            return
        if not alive and (gone or time.monotonic() - alive_at >= DEAD):
            return
        time.sleep(every)


def _line(found: Progress) -> str:
    """Where there is no terminal."""
    status, left = found.status, found.seconds_left
    parts = [f"{_name(status)}: {_doing(found)}"]
    parts += [f"{rows:,} rows read"] if (rows := _rows(found)) else []
    parts += [f"{_done(found):,} of {status.planned:,}"] if status.planned else []
    parts += [f"{status.quarantined:,} quarantined"] if status.quarantined else []
    parts += [f"{found.images_per_second:,.1f} images/s"] if found.images_per_second and found.at_work else []
    parts += [f"{span(left)} left"] if left is not None and found.at_work else []
    return ", ".join(parts)


def _view(found: Progress) -> RenderableType:
    status = found.status
    colour = {"complete": "green", "planned": "blue"}.get(status.state, "cyan" if found.at_work else "yellow")
    parts: list[RenderableType] = [Text.from_markup(f"[bold]{_name(status)}[/] [{colour}]{_doing(found)}[/]")]
    if status.planned:
        done, width = _done(found), min(people.width - 10, _WIDTH)
        bar = Table.grid(padding=(0, 1))
        drawn = ProgressBar(status.planned, done, width=width, complete_style=colour, finished_style=colour)
        bar.add_row(" ", drawn, f"{100 * done // status.planned} %")
        parts.append(bar)
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim")
    facts.add_column(overflow="fold")
    for name, value in _facts(found):
        facts.add_row(f"  {name}", value)
    parts.append(facts)
    if found.reasons:
        parts += ["", _reasons(found)]
    now = found.driver.now if found.at_work and found.driver else {}
    if crew := now.get("crew"):
        parts += ["", _crew(crew, int(now.get("workers", len(crew))))]
    return Group(*parts)


def _doing(found: Progress) -> str:
    """Its state in a few words, with who is at work."""
    status, driver = found.status, found.driver
    if driver is not None and found.at_work:
        stage = str(driver.now.get("stage", "starting"))
        return f"{_STAGES.get(stage, plain(stage))} by driver {driver.pid} on {plain(driver.host)}"
    if status.state == "complete":
        return "is complete"
    return f"is {'not planned yet' if status.state == 'planning' else status.state}; {_absent(driver)}"


def _name(status: Status) -> str:
    """The job's, or its output's before it is planned."""
    return plain(status.name or status.output)


def _rows(found: Progress) -> int:
    """Rows of the table that are read, while a driver plans."""
    if found.driver is None or not (found.at_work or found.status.state == "planning"):
        return 0
    return int(found.driver.now.get("rows", 0)) if found.driver.now.get("stage") == "planning" else 0


def _absent(driver: Driver | None) -> str:
    if driver is None or driver.state == "ended":
        return "nobody is at work on it"
    if driver.state == "dead":
        return f"driver {driver.pid} on {plain(driver.host)} died {span(driver.seconds_silent)} ago"
    return f"driver {driver.pid} on {plain(driver.host)} has been silent for {span(driver.seconds_silent)}"


def _facts(found: Progress) -> Iterator[tuple[str, str]]:
    status, driver, left = found.status, found.driver, found.seconds_left
    in_flight = int(driver.now.get("in_flight", 0)) if found.at_work and driver else 0
    if driver is not None and found.at_work and driver.now.get("note"):
        yield "waiting", plain(str(driver.now["note"]))
    if rows := _rows(found):
        yield "rows read", f"{rows:,}"
    if status.state == "planning":
        return
    yield "planned", f"{status.planned:,}"
    yield "committed", f"{status.committed:,}" + (f" and {in_flight:,} made, not committed yet" if in_flight else "")
    yield "quarantined", f"[red]{status.quarantined:,}[/]{of_checks(status.dropped)}" if status.quarantined else "0"
    if status.remaining:
        yield "remaining", f"{status.remaining:,}"
    if found.images_per_second:
        told = f"{found.images_per_second:,.1f} images/s"
        if found.at_work and left is not None:
            told += f", {span(left)} left: done {_when(left)}"
        elif left is not None:
            told += f" when last at work; {span(left)} to go at that"
        yield "speed", told
    yield "shards", f"{status.shards_committed:,} of {status.shards:,}"
    yield "size", size(status.bytes)
    if found.at_work and driver is not None and driver.now.get("deaths"):
        yield "replaced", f"[yellow]{int(driver.now['deaths']):,}[/] of the actors, which died"


def _reasons(found: Progress) -> RenderableType:
    table = Table(box=None, padding=(0, 2), header_style="dim", title_justify="left")
    table.add_column("failed", justify="right")
    table.add_column("why", overflow="fold")
    ordered = sorted(found.reasons.items(), key=lambda pair: -pair[1])
    for reason, count in ordered[:_REASONS]:
        table.add_row(f"[red]{count:,}[/]", plain(reason))
    if len(ordered) > _REASONS:
        rest = ordered[_REASONS:]
        table.add_row(f"[red]{sum(count for _, count in rest):,}[/]", f"{len(rest)} more reasons: sdbatch errors")
    return table


def _crew(crew: list[dict[str, Any]], workers: int) -> RenderableType:
    """The first of so many workers, not all of whom a driver tells of."""
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for name in ("actor", "node", "state", "images", "shards"):
        table.add_column(name, justify="right" if name in {"actor", "images"} else "left")
    for worker in crew[:_ACTORS]:
        shards = ", ".join(str(int(number)) for number in worker.get("shards", ()))
        node, state = plain(str(worker.get("node", "")))[:8], plain(str(worker.get("state", "")))
        table.add_row(str(worker.get("number", "")), node, state, f"{int(worker.get('images', 0)):,}", shards)
    if workers > _ACTORS:
        table.add_row("", "", f"and {workers - _ACTORS:,} more", "", "")
    return table


def _done(found: Progress) -> int:
    driver = found.driver
    in_flight = int(driver.now.get("in_flight", 0)) if found.at_work and driver else 0
    return min(found.status.committed + found.status.quarantined + in_flight, found.status.planned)


def _when(seconds: float) -> str:
    end, today = time.localtime(time.time() + seconds), time.localtime()
    return time.strftime("at about %H:%M" if end[:3] == today[:3] else "on %A %d %B at about %H:%M", end)
