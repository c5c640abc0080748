"""Every error that sdbatch raises on purpose, and the exit code it ends a command with.

    SdbatchError                 1   something failed that is nobody's typing mistake
    ├── UsageError               2   what the user wrote can't be done; nothing was started
    │   ├── SpecError            2   the job spec; holds one Problem for each mistake
    │   ├── InputError           2   the prompt table: missing, unreadable, wrong columns or values
    │   ├── ModelError           2   the checkpoint: missing, incomplete, not of a known family
    │   ├── OutputError          2   the output can't be used: unwritable, or no job in it
    │   └── PlanChanged          2   spec or input differ from what the output was planned from
    ├── StorageError             1   the store refused or stayed away; the job can be resumed
    │   ├── ObjectNotFound       1   no object under that key
    │   └── StoreAway            1   out of reach, or it does not know who asks: no fault of what was asked for
    └── JobFailed                1   the job ended before its images were done; it can be resumed
        └── BudgetSpent          1   … because a limit that its spec sets was reached
    Interrupted                130   somebody asked to stop; the job can be resumed

Messages say what was wrong, where (field, file and row, URI) and what to do about it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


class SdbatchError(Exception):
    """Root of the tree. ``exit_code`` is the status the command line ends with."""

    exit_code = 1


class UsageError(SdbatchError):
    """The request can't be carried out as written."""

    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One mistake in a job spec: the dotted ``field``, what is wrong, and a remedy."""

    field: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" + (f" ({self.hint})" if self.hint else "")


class SpecError(UsageError):
    """All mistakes of a job spec at once, in ``problems``."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.source = source
        self.problems = tuple(problems)
        count = "1 mistake" if len(self.problems) == 1 else f"{len(self.problems)} mistakes"
        super().__init__(f"{source}: {count}\n" + "\n".join(f"  {p}" for p in self.problems))


class InputError(UsageError):
    """The prompt table can't be read or planned."""


class ModelError(UsageError):
    """The model can't be loaded."""


class OutputError(UsageError):
    """The output location can't be used."""


class PlanChanged(UsageError):
    """The job spec or the input changed since the output was planned."""


class StorageError(SdbatchError):
    """An object store failed for good."""


class ObjectNotFound(StorageError):
    """There is no object under that key."""


class StoreAway(StorageError):
    """The store can't be reached, or does not accept the credentials; what was asked for may be in order."""


@contextmanager
def told_of(field: str, mistake: type[UsageError]) -> Iterator[None]:
    """What a store says is told of a field: as such a mistake, or as it is where another time may do."""
    try:
        yield
    except StoreAway as error:
        raise StoreAway(f"{field}: {error}") from None
    except StorageError as error:
        raise mistake(f"{field}: {error}") from None


class JobFailed(SdbatchError):
    """The job ended before all images were made. The same command resumes it."""


class BudgetSpent(JobFailed):
    """The job reached a limit that its spec sets, such as what it may cost or how many images may fail."""


class Interrupted(BaseException):
    """A signal asked the command to stop. No Exception: what catches those, ours or a library's, lets it pass."""

    exit_code = 130
