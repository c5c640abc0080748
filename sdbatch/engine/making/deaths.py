"""How an actor died, as far as Ray knows, in plain words."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, OutOfMemoryError, RayActorError, RayError

#: Seconds that an actor out of reach has to answer.
_REACH = 10.0
_MACHINE = "its machine was lost"


@dataclass(frozen=True)
class Death:
    """``innocent``: whatever the actor was at, it did not die of it. ``machine``: it did not die alone."""

    how: str
    innocent: bool
    machine: bool


def inquire(actor: Any, error: RayError) -> Death:
    """What became of an actor one of whose tasks ended with ``error``."""
    if isinstance(error, ActorUnavailableError):  # dead, it may be, and the news is on its way
        try:
            ray.get(actor.images_made.options(concurrency_group="watch").remote(), timeout=_REACH)
        except GetTimeoutError:
            pass
        except RayError as later:
            error = later
    if isinstance(error, ActorUnavailableError):
        return Death("it was out of reach", innocent=True, machine=True)
    how = _in_words(error)
    return Death(how, isinstance(error, RayActorError) and error.preempted, how == _MACHINE)


def _in_words(error: RayError) -> str:
    told = " ".join(str(error).split())
    code = re.search(r"exit code (\d+)", told)
    if "SIGTERM" in told:
        return "it was told to end (SIGTERM)"
    if isinstance(error, OutOfMemoryError) or "running low on memory" in told:
        return "Ray ended it because its machine was out of memory"
    if code is not None:
        return f"exit code {code[1]}"
    if "connection error" in told:  # Ray hears no more of any sudden end
        return (
            "it ended suddenly: by a crash (SIGSEGV, SIGABRT), by the system when memory was out, "
            "or by somebody's SIGKILL"
        )
    if "node" in told and ("died" in told or "dead" in told):
        return _MACHINE
    return told.rpartition("died unexpectedly before finishing this task.")[2].strip() or told
