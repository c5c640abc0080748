"""From a template to prompts: by chance from a seed, or all that it can say, in a fixed order."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, combinations, product
from types import MappingProxyType
from typing import Any

from sdbatch.prompts.template import Choice, Column, Option, Template, Wildcard

#: Name of a wildcard → its lines.
Wildcards = Mapping[str, tuple[Option, ...]]


class Chance:
    """Numbers drawn from a key: the same on any machine, whatever else was drawn."""

    def __init__(self, *key: Any) -> None:
        self._key, self._drawn = json.dumps(key).encode(), 0

    def uniform(self) -> float:
        """In [0, 1), of 53 bits."""
        drawn = hashlib.blake2b(self._drawn.to_bytes(8, "big") + self._key, digest_size=8).digest()
        self._drawn += 1
        return (int.from_bytes(drawn, "big") >> 11) / 2.0**53

    def below(self, count: int) -> int:
        return int(self.uniform() * count)

    def pick(self, weights: Sequence[float]) -> int:
        """An index, as often as its weight says; one of them is not 0."""
        point = self.uniform() * sum(weights)
        for index, weight in enumerate(weights):
            point -= weight
            if point < 0:
                return index
        return max(index for index, weight in enumerate(weights) if weight)


@dataclass(frozen=True)
class Words:
    """What a template's names stand for: cells and matrix values by name, lines by wildcard.

    What is found out of wildcards, whose lines name no cells, may be shared by the words of many rows.
    """

    values: Mapping[str, str]
    wildcards: Wildcards = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)  # of prompts, by wildcard
    sums: dict[str, list[float]] = field(default_factory=dict)  # of the weights up to each line, by wildcard

    @property
    def of_files(self) -> Words:
        """What there is for the lines of files."""
        return Words({}, self.wildcards, self.counts, self.sums)

    def chosen(self, choice: Choice) -> Choice | str:
        """A column's cell, where the choice is one with something to stand in for it."""
        name = choice.perhaps_column
        if name is None or name not in self.values:
            return choice
        return self.values[name] or Choice(choice.options[1:])

    def lines(self, wildcard: Wildcard) -> tuple[Option, ...]:
        if "*" not in wildcard.name:
            return self.wildcards[wildcard.name]
        return tuple(line for name in matching(wildcard.name, self.wildcards) for line in self.wildcards[name])


def matching(name: str, wildcards: Iterable[str]) -> list[str]:
    """The wildcards that a name, perhaps with ``*``, stands for, in order."""
    return sorted(fnmatch.filter(wildcards, name)) if "*" in name else [name] if name in wildcards else []


def longest(
    template: Template, wildcards: Wildcards, known: dict[str, int], values: Mapping[str, str] = MappingProxyType({})
) -> int:
    """No fewer characters than any of its prompts has, with these ``values``, and no fewer than it has parts.

    ``known``: the same of wildcards, as they are found out.
    """
    return sum(max(_longest_part(part, wildcards, known, values), 1) for part in template)


def _longest_part(
    part: str | Column | Wildcard | Choice, wildcards: Wildcards, known: dict[str, int], values: Mapping[str, str]
) -> int:
    if isinstance(part, Wildcard):
        if part.name not in known:
            lines = (line for name in matching(part.name, wildcards) for line in wildcards[name])
            known[part.name] = max((longest(line.parts, wildcards, known) for line in lines), default=0)
        return known[part.name]
    if isinstance(part, Choice):
        one = max(longest(option.parts, wildcards, known, values) for option in part.options)
        one = max(one, len(values.get(part.perhaps_column or "", "")))
        return part.high * (max(one, 1) + len(part.separator))
    return len(part) if isinstance(part, str) else len(values.get(part.name, ""))


def drawn(template: Template, words: Words, chance: Chance) -> str:
    """One prompt, by chance."""
    said = []
    for part in template:
        if isinstance(part, Choice):
            picked = words.chosen(part)
            said.append(picked if isinstance(picked, str) else _drawn_choice(picked, words, chance))
        elif isinstance(part, Wildcard):
            said.append(drawn(_drawn_line(part, words, chance).parts, words.of_files, chance))
        else:
            said.append(words.values[part.name] if isinstance(part, Column) else part)
    return "".join(said)


def _drawn_line(wildcard: Wildcard, words: Words, chance: Chance) -> Option:
    """A line of a file that may have many."""
    lines = words.lines(wildcard)
    if wildcard.name not in words.sums:
        words.sums[wildcard.name] = list(accumulate(line.weight for line in lines))
    sums = words.sums[wildcard.name]
    return lines[min(bisect_right(sums, chance.uniform() * sums[-1]), len(lines) - 1)]


def _drawn_choice(choice: Choice, words: Words, chance: Chance) -> str:
    count = choice.low + (chance.below(choice.high - choice.low + 1) if choice.high > choice.low else 0)
    left, said = list(choice.options), []
    for _ in range(count):
        weights = [option.weight for option in left]
        if not any(weights):
            break
        said.append(drawn(left.pop(chance.pick(weights)).parts, words, chance))
    return choice.separator.join(said)


def count(template: Template, words: Words) -> int:
    """How many prompts :func:`every` gives; nothing is built."""
    total = 1
    for part in template:
        if isinstance(part, Choice):
            picked = words.chosen(part)
            total *= 1 if isinstance(picked, str) else _count_choice(picked, words)
        elif isinstance(part, Wildcard):
            if part.name not in words.counts:
                words.counts[part.name] = _count_choice(Choice(words.lines(part)), words.of_files)
            total *= words.counts[part.name]
    return total


def _count_choice(choice: Choice, words: Words) -> int:
    """By the number of options taken: sums of products, one option after the other."""
    ways = [1] + [0] * choice.high
    for option in choice.options:
        inner = count(option.parts, words)
        for taken in range(choice.high, 0, -1):
            ways[taken] += inner * ways[taken - 1]
    return sum(ways[choice.low :])


def every(template: Template, words: Words) -> Iterator[str]:
    """Every prompt that the template can say; what stands last varies fastest. Weights don't matter."""
    for said in product(*(list(_every_part(part, words)) for part in template)):
        yield "".join(said)


def _every_part(part: str | Column | Wildcard | Choice, words: Words) -> Iterator[str]:
    if isinstance(part, Choice):
        picked = words.chosen(part)
        yield from [picked] if isinstance(picked, str) else _every_choice(picked, words)
    elif isinstance(part, Wildcard):
        yield from _every_choice(Choice(words.lines(part)), words.of_files)
    else:
        yield words.values[part.name] if isinstance(part, Column) else part


def _every_choice(choice: Choice, words: Words) -> Iterator[str]:
    """Options keep their order: "a, b" comes, "b, a" does not."""
    for taken in range(choice.low, choice.high + 1):
        for options in combinations(choice.options, taken):
            joined: Template = ()
            for i, option in enumerate(options):
                joined += (choice.separator, *option.parts) if i else option.parts
            yield from every(joined, words)
