"""A condition on the columns of the metadata table: ``clip_score > 0.3 and category in ['cat', 'dog']``.

Python's grammar, of which only comparisons, ``and``, ``or`` and ``not`` are known; nothing is ever run.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from sdbatch.errors import UsageError

Row = Mapping[str, Any]
_Test = Callable[[Row], bool]

_OPERATORS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.In: lambda cell, values: cell in values,
    ast.NotIn: lambda cell, values: cell not in values,
}
_HOW = "write a condition such as: clip_score > 0.3 and category in ['cat', 'dog']"
_MOST_CHARACTERS = 2000


class Where:
    """Is a row one of those that are wanted? Raises UsageError for what is no condition.

    A cell that is empty, or no number where it is compared with one, makes every comparison false.
    """

    def __init__(self, text: str) -> None:
        self.columns: set[str] = set()
        if len(text) > _MOST_CHARACTERS:
            raise UsageError(f"--where: has more than {_MOST_CHARACTERS:,} characters")
        try:
            tree = ast.parse(text.strip(), mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise UsageError(f"--where: {text!r} can't be read; {_HOW}") from None
        try:
            self._test = self._read(tree.body)
        except RecursionError:
            raise UsageError(f"--where: is nested too deeply; {_HOW}") from None

    def __call__(self, row: Row) -> bool:
        return self._test(row)

    def _read(self, node: ast.expr) -> _Test:
        if isinstance(node, ast.BoolOp):
            tests = [self._read(value) for value in node.values]
            every = all if isinstance(node.op, ast.And) else any
            return lambda row: every(test(row) for test in tests)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            test = self._read(node.operand)
            return lambda row: not test(row)
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.left, ast.Name):
            return self._compare(node.left.id, node.ops[0], node.comparators[0])
        raise UsageError(f"--where: {ast.unparse(node)} is no comparison of a column with a value; {_HOW}")

    def _compare(self, column: str, how: ast.cmpop, value: ast.expr) -> _Test:
        several = isinstance(how, ast.In | ast.NotIn)
        try:
            wanted = ast.literal_eval(value)
        except (ValueError, TypeError):  # no literal, or one of what can't be in a set
            wanted = None
        values = wanted if several else [wanted]
        if type(how) not in _OPERATORS or not isinstance(values, list | tuple) or not all(map(_plain, values)):
            raise UsageError(f"--where: {column} is compared with {ast.unparse(value)}, which is no value; {_HOW}")
        self.columns.add(column)
        compare, number = _OPERATORS[type(how)], all(isinstance(one, int | float) for one in values)

        def test(row: Row) -> bool:
            cell = row[column]
            if number and isinstance(cell, str):  # the user's columns are text
                try:
                    cell = float(cell)
                except ValueError:
                    return False
            try:
                return cell is not None and compare(cell, wanted)
            except TypeError:  # a number and a text
                return False

        return test


def _plain(value: object) -> bool:
    return isinstance(value, str | int | float | bool)
