"""A job at set times: the line for cron, the units for systemd, the manifests for Kubernetes and KubeRay."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from sdbatch import __version__
from sdbatch.engine.cron import Cron
from sdbatch.errors import UsageError
from sdbatch.spec import JobSpec

_MOUNT = "/job"


@dataclass(frozen=True)
class Scheduled:
    """What is to be run, when. ``arguments`` follow the spec's path; ``command`` is run, or submit to a cluster."""

    job: Path
    spec: JobSpec
    cron: Cron
    command: str
    arguments: tuple[str, ...]
    image: str = "sdbatch:latest"

    @property
    def name(self) -> str:
        """A name for units and manifests: lower case, at most 40 characters, the file's."""
        stem = re.sub(r"[^a-z0-9]+", "-", self.job.stem.lower())[:32].strip("-")
        return f"sdbatch-{stem or 'job'}"

    def words(self, python: str, job: str) -> list[str]:
        return [python, "-m", "sdbatch", self.command, job, *self.arguments]


def crontab(scheduled: Scheduled) -> str:
    """A line for ``crontab -e``. Cron ends a command at a line break, and reads % as one."""
    job = scheduled.job.absolute()
    command = shlex.join(scheduled.words(sys.executable, str(job)))
    line = f"cd {shlex.quote(str(Path.cwd()))} && {command} >>{shlex.quote(f'{job}.log')} 2>&1"
    if "\n" in line or "\r" in line:
        raise UsageError("--set: cron knows no line breaks; write the value into the job spec")
    return f"{scheduled.cron.expression} {line.replace('%', chr(92) + '%')}\n"


def systemd(scheduled: Scheduled) -> str:
    """A service and its timer, one after the other, each after a comment that says where it belongs."""
    name = scheduled.name
    words = scheduled.words(sys.executable, str(scheduled.job.absolute()))
    on_calendar = "".join(f"OnCalendar={line}\n" for line in scheduled.cron.calendar())
    return (
        f"# ~/.config/systemd/user/{name}.service\n"
        f"[Unit]\nDescription=sdbatch {scheduled.job.name.replace('%', '%%')}\n"
        "StartLimitIntervalSec=1d\nStartLimitBurst=5\n\n"
        "[Service]\nType=oneshot\n"
        f"WorkingDirectory={str(Path.cwd()).replace('%', '%%')}\n"
        f"ExecStart={' '.join(_unit_word(word) for word in words)}\n"
        "# 3: complete, with quarantined images. 2: nothing was started, and nothing would be another time.\n"
        "SuccessExitStatus=3\nRestart=on-failure\nRestartPreventExitStatus=2\nRestartSec=60\n\n"
        f"# ~/.config/systemd/user/{name}.timer\n"
        f"[Unit]\nDescription=When sdbatch {scheduled.job.name.replace('%', '%%')} runs\n\n"
        f"[Timer]\n{on_calendar}Persistent=true\n\n"
        "[Install]\nWantedBy=timers.target\n"
    )


def kubernetes(scheduled: Scheduled) -> str:
    """A CronJob whose pod runs the whole job, or submits it to a cluster and waits."""
    resources = scheduled.spec.resources
    gpus = -(-int(1000 * resources.gpus_per_actor * resources.fewest) // 1000) if scheduled.command == "run" else 0
    cpus = resources.fewest * resources.cpus_per_actor + 1 if scheduled.command == "run" else 1
    pod = _pod(scheduled, "sdbatch", cpus, gpus)
    pod["spec"]["restartPolicy"] = "Never"
    words = scheduled.words("python", f"{_MOUNT}/job.yaml")
    pod["spec"]["containers"][0]["command"] = [word.replace("$(", "$$(") for word in words]
    rules = [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2, 3]}},
    ]
    return _manifests(
        scheduled,
        {
            "apiVersion": "batch/v1",
            "kind": "CronJob",
            "metadata": {"name": scheduled.name},
            "spec": {
                "schedule": scheduled.cron.expression,
                "timeZone": "Etc/UTC",
                "concurrencyPolicy": "Forbid",
                "jobTemplate": {
                    "spec": {"backoffLimit": 5, "podFailurePolicy": {"rules": rules}, "template": pod},
                },
            },
        },
    )


def rayjob(scheduled: Scheduled) -> str:
    """A RayCronJob of KubeRay: a cluster of its own for each run, gone after it."""
    resources = scheduled.spec.resources
    head = _pod(scheduled, "ray-head", 2, 0)
    worker = _pod(scheduled, "ray-worker", resources.cpus_per_actor + 1, int(-(-resources.gpus_per_actor // 1)))
    del worker["spec"]["volumes"], worker["spec"]["containers"][0]["volumeMounts"]  # the head alone reads the spec
    cluster = {
        "rayVersion": version("ray"),
        "enableInTreeAutoscaling": True,
        "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "template": head},
        "workerGroupSpecs": [
            {
                "groupName": "generators",
                "minReplicas": 0,
                "replicas": 0,
                "maxReplicas": resources.most,
                "rayStartParams": {},
                "template": worker,
            }
        ],
    }
    return _manifests(
        scheduled,
        {
            "apiVersion": "ray.io/v1",
            "kind": "RayCronJob",
            "metadata": {"name": scheduled.name},
            "spec": {
                "schedule": scheduled.cron.expression,
                "jobTemplate": {
                    "entrypoint": shlex.join(scheduled.words("python", f"{_MOUNT}/job.yaml")),
                    "shutdownAfterJobFinishes": True,
                    "rayClusterSpec": cluster,
                },
            },
        },
    )


FORMS: dict[str, Callable[[Scheduled], str]] = {
    "crontab": crontab,
    "systemd": systemd,
    "kubernetes": kubernetes,
    "rayjob": rayjob,
}


def _pod(scheduled: Scheduled, container: str, cpus: int, gpus: int) -> dict[str, Any]:
    """A pod with the job spec in a folder, and room."""
    amounts: dict[str, Any] = {"cpu": str(cpus), "memory": "8Gi"} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
    return {
        "spec": {
            "containers": [
                {
                    "name": container,
                    "image": scheduled.image,
                    "resources": {"requests": amounts, "limits": dict(amounts)},
                    "volumeMounts": [{"name": "job", "mountPath": _MOUNT, "readOnly": True}],
                }
            ],
            "volumes": [{"name": "job", "configMap": {"name": scheduled.name}}],
        }
    }


def _manifests(scheduled: Scheduled, manifest: dict[str, Any]) -> str:
    """The manifest after that of the job spec's file."""
    text = scheduled.job.read_text(encoding="utf-8")
    job = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": scheduled.name},
        "data": {"job.yaml": text},
    }
    comment = f"# Written by sdbatch {__version__}: kubectl apply -f\n"
    documents = yaml.dump_all([job, manifest], Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return f"{comment}{documents}"


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as it is."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def _unit_word(word: str) -> str:
    """A word of a command in a unit, where % and $ stand for something, and quotes keep blanks."""
    if any(not char.isprintable() for char in word):
        raise UsageError("--set: a unit knows no control characters; write the value into the job spec")
    word = word.replace("%", "%%").replace("$", "$$").replace("\\", "\\\\").replace('"', '\\"')
    return f'"{word}"' if not word or re.search(r"""[\s"'\\;]""", word) else word
