"""Commands about where and when jobs run: submit, schedule, doctor."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from sdbatch.cli.console import facts, people, plain, print_json, tell
from sdbatch.cli.jobs import Date, Extend, Job, Json, Set
from sdbatch.errors import Interrupted, OutputError
from sdbatch.spec import load_spec, today


class Form(StrEnum):
    """What a schedule is written for."""

    crontab = "crontab"
    systemd = "systemd"
    kubernetes = "kubernetes"
    rayjob = "rayjob"


def submit(
    job: Job,
    address: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard: http://HEAD:8265.")
    ],
    set_: Set = [],  # noqa: B006
    date: Date = None,
    extend: Extend = False,
    wait: Annotated[bool, typer.Option("--wait", help="Show its log and end with its exit code.")] = False,
    as_json: Json = False,
) -> None:
    """Have a Ray cluster run a job; it goes on when this command or machine is gone."""
    from sdbatch.engine.submission import JobServer, refuse_unreachable, submission_of

    day = date.date() if date else today()
    spec = load_spec(job, set_, day)
    refuse_unreachable(spec, str(job))
    server = JobServer(address)
    sent = server.send(submission_of(spec, job.read_bytes(), set_, day, extend=extend))
    places = f"--address {shlex.quote(address)} {sent.id}"
    look = {"log": f"ray job logs -f {places}", "stop": f"ray job stop {places}", "output": spec.output.uri}
    tell(f"[green]✓[/] {escape(sent.id)} {'is at work there already' if sent.attached else 'is on its way'}")
    facts({name: escape(text) for name, text in look.items()})
    told = {"id": sent.id, "attached": sent.attached, **look}
    if not wait:
        if as_json:
            print_json(told)
        return
    try:
        code = server.wait(sent.id, lambda text: people.out(text, end="", highlight=False))
    except Interrupted:
        raise Interrupted(f"{sent.id} goes on; its log: {look['log']}; to stop it: {look['stop']}") from None
    if as_json:
        print_json({**told, "exit_code": code})
    else:
        tell(f"{'[green]✓[/]' if code == 0 else '[yellow]![/]'} {escape(sent.id)} ended with exit code {code}")
    raise typer.Exit(code)


def doctor(
    job: Annotated[Path | None, typer.Argument(metavar="[JOB.yaml]", help="The job that is to run.")] = None,
    set_: Set = [],  # noqa: B006
    date: Date = None,
    as_json: Json = False,
) -> None:
    """Check Ray, GPU, storage rights, model and clock, and say what to do about what is wrong."""
    from sdbatch.engine import doctor as examination

    spec = None if job is None else load_spec(job, set_, date and date.date())
    findings = []
    for finding in examination.examine(spec):
        findings.append(finding)
        if not as_json:
            mark = {"fine": "[green]✓[/]", "odd": "[yellow]![/]", "bad": "[red]✗[/]"}[finding.state]
            remedy = f" → {plain(finding.remedy)}" if finding.remedy else ""
            tell(f"{mark} [bold]{finding.check}[/]: {plain(finding.told)}{remedy}")
    bad = any(finding.state == "bad" for finding in findings)
    if as_json:
        print_json({"ok": not bad, "checks": [asdict(finding) for finding in findings]})
    if bad:
        raise typer.Exit(2)


def schedule(
    job: Job,
    cron: Annotated[str, typer.Option(metavar="EXPRESSION", help="When: '0 6 * * 1' is every Monday at six.")],
    form: Annotated[Form, typer.Option("--as", help="What to write it for.")] = Form.crontab,
    set_: Set = [],  # noqa: B006
    extend: Extend = False,
    address: Annotated[
        str | None, typer.Option(help="Submit the job to this cluster and wait, rather than run it in place.")
    ] = None,
    image: Annotated[str, typer.Option(help="Container image with sdbatch, for kubernetes and rayjob.")] = (
        "sdbatch:latest"
    ),
    to: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it here instead of to stdout.")] = None,
    as_json: Json = False,
) -> None:
    """Write what runs a job at set times: a crontab line, systemd units, or a manifest."""
    from sdbatch.engine import schedule as schedules
    from sdbatch.engine.cron import read_cron
    from sdbatch.engine.submission import refuse_unreachable

    spec, when = load_spec(job, set_), read_cron(cron)
    if form in {Form.kubernetes, Form.rayjob} or address is not None:
        refuse_unreachable(spec, str(job))
    arguments = [word for override in set_ for word in ("--set", override)] + ["--extend"] * extend
    command = "run" if address is None else "submit"
    if address is not None:
        if form == Form.rayjob:
            raise typer.BadParameter("a RayCronJob brings its own cluster", param_hint="--address")
        arguments += ["--address", address, "--wait"]
    text = schedules.FORMS[form](schedules.Scheduled(job, spec, when, command, tuple(arguments), image))
    if to is not None:
        try:
            to.write_text(text, encoding="utf-8")
        except OSError as error:
            raise OutputError(f"--to: {to} can't be written: {error.strerror}") from None
        tell(f"[green]✓[/] {escape(str(to))}")
    if as_json:
        print_json({"as": form.value, "cron": when.expression, "text": text})
    elif to is None:
        print(text, end="")
