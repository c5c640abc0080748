"""Words, colour and progress bars for people on stderr; JSON for machines on stdout."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:  # the engine imports Ray and torch, which commands that only read do not need
    from sdbatch.engine.snapshot import Snapshot, Watch

people = Console(stderr=True, highlight=False)

_PLAIN_SECONDS = 5.0


def print_json(content: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(asdict(content) if is_dataclass(content) and not isinstance(content, type) else content, indent=2))


def tell(*lines: str) -> None:
    """Lines for people; markup as rich knows it."""
    for line in lines:
        people.print(line, soft_wrap=True)


def facts(pairs: Mapping[str, str]) -> None:
    """Aligned name and value, one a line."""
    width = max(len(name) for name in pairs)
    for name, value in pairs.items():
        people.print(f"  [dim]{name:<{width}}[/]  {value}", soft_wrap=True)


def plain(text: str) -> str:
    """Text that is not ours, harmless in a terminal: no markup, no control characters."""
    return escape("".join(char if char.isprintable() else "�" for char in text))


@contextmanager
def bar(label: str) -> Iterator[Any]:
    """A progress bar, ``update(done, total, text)``; plain lines now and then where there is no terminal."""
    if not people.is_terminal:
        yield _Lines(label)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=people, transient=True) as progress:
        task = progress.add_task(label, total=None, text="")

        def update(done: int, total: int | None, text: str, label: str = label) -> None:
            progress.update(task, completed=done, total=total, text=text, description=label)

        yield update


class _Lines:
    """What a bar becomes in a log file: a line every few seconds and at every change of stage, never the same again."""

    def __init__(self, label: str) -> None:
        self._label, self._last, self._said = label, 0.0, ""

    def __call__(self, done: int, total: int | None, text: str, label: str | None = None) -> None:
        now = time.monotonic()
        changed = label is not None and label != self._label
        if not changed and now - self._last < _PLAIN_SECONDS and done != total:
            return
        self._label, self._last = label or self._label, now
        line = f"{self._label}: {done:,}{f' of {total:,}' if total else ''} {text}".rstrip()
        if line != self._said:
            self._said = line
            people.print(line, soft_wrap=True)


@contextmanager
def watching() -> Iterator[Watch]:
    """A watch for a run: images done, images a second, time left, quarantined."""
    with bar("starting") as update:
        first: list[tuple[float, int]] = []

        def watch(now: Snapshot) -> None:
            if now.stage == "planning":
                update(now.rows, None, "rows read", label="planning")
                return
            if now.stage == "waiting":
                update(0, None, now.note, label="waiting")
                return
            done = now.finished + now.in_flight
            text = ""
            if now.stage not in {"making", "done"} or (first and done < first[0][1]):
                first.clear()  # what is made again is counted anew
            if now.stage in {"making", "done"}:
                first.append((time.monotonic(), done)) if not first else None
                seconds, images = time.monotonic() - first[0][0], done - first[0][1]
                rate = images / seconds if seconds > 0.5 else 0.0
                text = f"{rate:.1f} images/s" if rate else ""
                if rate and not people.is_terminal:
                    text += f", {span((now.planned - done) / rate)} left"
            if now.quarantined:
                text += f" [red]{now.quarantined:,} quarantined[/]"
            if now.deaths:
                text += f" [yellow]{now.deaths:,} actors replaced[/]"
            label = {"loading": "loading the model", "starting": "starting"}.get(now.stage, "images")
            update(done, now.planned or None, text.strip(), label=label)

        yield watch


def of_checks(dropped: int) -> str:
    """How many of the quarantined that is, in words."""
    return f", {dropped:,} of them dropped by checks" if dropped else ""


def size(count: int) -> str:
    """Bytes in words."""
    for unit, name in ((10**9, "GB"), (10**6, "MB")):
        if count >= unit:
            return f"{count / unit:,.2f} {name}"
    return f"{count / 1e3:,.1f} kB"


def span(seconds: float) -> str:
    """A length of time in words."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 100:
        return f"{hours / 24:,.0f} days"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
