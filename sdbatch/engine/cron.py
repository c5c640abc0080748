"""Cron expressions of five fields: checked, and said in the words of systemd."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sdbatch.errors import UsageError

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
#: Days that a month has at most.
_LONGEST = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


@dataclass(frozen=True)
class _Field:
    """What a field may hold. ``names`` stand for the numbers from ``first`` on."""

    name: str
    first: int
    last: int
    names: tuple[str, ...] = ()

    def values(self, text: str) -> tuple[int, ...]:
        """The numbers that the field stands for."""
        found: set[int] = set()
        for part in text.split(","):
            known = re.fullmatch(r"(\*|(\w+)(?:-(\w+))?)(?:/(\d{1,2}))?", part, re.ASCII)
            if known is None:
                raise UsageError(f"--cron: the {self.name} is '{part}'; write a number, a-b, *, */n, or several with ,")
            begin, end, step = self.first, self.last, int(known[4] or 1)
            if known[2] is not None:
                begin = self._number(known[2])
                end = self._number(known[3]) if known[3] else self.last if known[4] else begin
            if begin > end or not step:
                raise UsageError(f"--cron: the {self.name} '{part}' stands for nothing")
            found.update(range(begin, end + 1, step))
        return tuple(sorted(found))

    def _number(self, word: str) -> int:
        if word.lower() in self.names:
            return self.first + self.names.index(word.lower())
        if not word.isdigit() or not self.first <= int(word) <= self.last:
            names = f" or {', '.join(self.names)}" if self.names else ""
            raise UsageError(f"--cron: the {self.name} is '{word}'; it goes from {self.first} to {self.last}{names}")
        return int(word)


_FIELDS = (
    _Field("minute", 0, 59),
    _Field("hour", 0, 23),
    _Field("day of the month", 1, 31),
    _Field("month", 1, 12, _MONTHS),
    _Field("day of the week", 0, 7, _DAYS),
)


@dataclass(frozen=True)
class Cron:
    """A checked expression."""

    expression: str
    minutes: tuple[int, ...]
    hours: tuple[int, ...]
    days: tuple[int, ...]
    months: tuple[int, ...]
    weekdays: tuple[int, ...]

    def calendar(self) -> list[str]:
        """The same as systemd's OnCalendar, in UTC.

        Where both kinds of day are told cron means either of them, systemd both: two lines then.
        """
        _, _, day, _, weekday = self.expression.split()
        months = _listed(self.months, 12)
        time = f"{_listed(self.hours, 24)}:{_listed(self.minutes, 60)}:00 UTC"
        on_days = f"*-{months}-{_listed(self.days, 31)} {time}"
        names = ",".join(dict.fromkeys(_DAYS[number % 7].capitalize() for number in self.weekdays))
        on_weekdays = f"{names} *-{months}-* {time}"
        if weekday.startswith("*"):
            return [on_days]
        return [on_weekdays] if day.startswith("*") else [on_days, on_weekdays]


def read_cron(expression: str) -> Cron:
    """Check an expression. Raises UsageError."""
    parts = expression.split()
    if len(parts) != len(_FIELDS):
        raise UsageError(
            f"--cron: '{expression}' should have five fields: minute, hour, day of the month, month, day of the week; "
            "'0 6 * * 1' is every Monday at six"
        )
    values = [field.values(part) for field, part in zip(_FIELDS, parts, strict=True)]
    minutes, hours, days, months, weekdays = values
    if parts[4].startswith("*") and min(days) > max(_LONGEST[month - 1] for month in months):
        raise UsageError(f"--cron: '{expression}' never comes: no such month has a day {min(days)}")
    return Cron(" ".join(parts), minutes, hours, days, months, weekdays)


def _listed(values: tuple[int, ...], everything: int) -> str:
    return "*" if len(values) == everything else ",".join(f"{value:02d}" for value in values)
