"""The command line: parse, call, print."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from types import FrameType

import typer
from rich.markup import escape
from typer.exceptions import TyperException

from sdbatch import __version__
from sdbatch.cli import bench, clusters, datasets, evaluation, jobs, models, progress, results, training
from sdbatch.cli.console import people, plain, print_json
from sdbatch.errors import Interrupted, SdbatchError, SpecError

app = typer.Typer(
    name="sdbatch",
    help="Tables of prompts in, pictures out, each exactly once.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
_COMMANDS: dict[str, tuple[Callable[..., None], ...]] = {
    "Make": (clusters.doctor, jobs.validate, jobs.plan, jobs.run, jobs.schema),
    "Elsewhere, later": (clusters.submit, clusters.schedule),
    "Watch": (progress.status, progress.watch, results.errors, results.report),
    "Prove, mend": (results.verify, results.retry, results.repair, results.remake),
    "Hand on": (results.duplicates, datasets.export),
    "Models": (models.inspect, evaluation.evaluate, training.finetune, training.train, bench.bench),
}
_STOPPED = "stopped by a signal; what is committed stays, the same command goes on from here"
_asked_to_stop = threading.Event()

for panel, commands in _COMMANDS.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"sdbatch {__version__}")
        raise typer.Exit()


@app.callback()
def _main(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main() -> None:
    """Run the command line and exit: 0 complete, 1 failed, 2 bad spec or usage, 3 with quarantined images,
    130 interrupted."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        code = call(sys.argv[1:])
    except Interrupted:  # a second signal, while the first was being told
        code = Interrupted.exit_code
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # it is ending as it is
    sys.exit(code)


def call(arguments: list[str]) -> int:
    """Run one command; returns its exit code."""
    try:
        code = app(args=arguments, prog_name="sdbatch", standalone_mode=False)
    except TyperException as error:
        people.print(f"[bold red]error[/]: {escape(error.format_message())} See 'sdbatch --help'.", soft_wrap=True)
        return 2
    except (Exception, Interrupted) as error:
        # What a signal raises within a call of Ray's own comes out of it in disguise, or not at all.
        told = error
        if _asked_to_stop.is_set() and not isinstance(error, Interrupted):
            told = Interrupted(_STOPPED)
        if not isinstance(told, SdbatchError | Interrupted):
            raise
        return _tell(told, as_json="--json" in arguments)
    return code if isinstance(code, int) else 0


def _tell(error: SdbatchError | Interrupted, *, as_json: bool) -> int:
    """Say what went wrong; returns the exit code."""
    if as_json:
        problems = [asdict(problem) for problem in error.problems] if isinstance(error, SpecError) else []
        print_json({"error": str(error), "kind": type(error).__name__, "problems": problems})
    mark = "[yellow]interrupted[/]" if isinstance(error, Interrupted) else "[bold red]error[/]"
    people.print(f"{mark}: " + "\n".join(plain(line) for line in str(error).splitlines()), soft_wrap=True)
    return error.exit_code


def _interrupt(number: int, frame: FrameType | None) -> None:
    _asked_to_stop.set()
    raise Interrupted(_STOPPED)
