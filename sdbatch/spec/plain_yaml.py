"""YAML as a job spec may hold it: plain data of bounded size."""

from __future__ import annotations

from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from sdbatch.spec.words import plain, shown

#: No job spec is longer, deeper, or has more parts once its aliases are written out.
MOST_BYTES = 100_000
_MOST_DEPTH = 20
_MOST_PARTS = 20_000


class _SpecLoader(yaml.SafeLoader):
    """Plain data of bounded size. What YAML would pass over in silence is refused: keys that are there twice."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._parts = 0
        self._parts_of: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next part. What an alias stands for counts every time."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        before, mark = self._parts, event.start_mark
        if self._depth == _MOST_DEPTH:
            raise ComposerError(None, None, f"is nested more than {_MOST_DEPTH} levels deep", mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is None:
            return None
        if not isinstance(event, yaml.AliasEvent):
            self._parts += 1
            self._parts_of[node] = self._parts - before
        elif node in self._parts_of:
            self._parts += self._parts_of[node]
        else:
            raise ComposerError(None, None, f"{shown(event.anchor)} is a part of itself", mark)
        if self._parts > _MOST_PARTS:
            raise ComposerError(None, None, f"has more than {_MOST_PARTS:,} parts", mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        key: Any
        for key, _ in node.value:
            if key.tag not in _KEY_TAGS:
                told = f"the key {shown(key.value)} is no text; put it in quotes"
                raise ComposerError(None, None, told, key.start_mark)
            if key.value in seen:
                raise ComposerError(None, None, f"the key {shown(key.value)} is there twice", key.start_mark)
            seen.add(key.value)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (AttributeError, LookupError, ValueError):  # what an impossible date, or number, makes the library raise
            told = f"{shown(node.value)} is no {shown(node.tag.rpartition(':')[2])}"
            raise ConstructorError(None, None, told, node.start_mark) from None


_KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


def read_yaml(text: str) -> Any:
    """The one document in ``text``. Raises YAMLError."""
    return yaml.load(text, _SpecLoader)  # noqa: S506 (it is a SafeLoader)


def told(error: yaml.YAMLError) -> str:
    """What is wrong, and where."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{plain(str(error.problem))}, in line {mark.line + 1}, column {mark.column + 1}"
    return " ".join(str(error).split())
