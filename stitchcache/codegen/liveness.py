"""Statements of generated code: where each value lives, and where it is freed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    from stitchcache.records import dataclass


INDENT = "    "
THROWAWAY = "_"

# Around the name of a value in an expression: no other text has this character, as literals are
# written with escapes.
_MARK = "\0"
_MARKED = re.compile(f"{_MARK}([^{_MARK}]*){_MARK}")


@dataclass(frozen=True, slots=True)
class Statement:
    """One assignment, before it is known where its values live and which of them anybody needs.

    Args:
        targets: Names of the values that it makes.
        expression: Source text of the right side, values written by `value_mark`.
        uses: Names of the values that the right side reads.
        unpack: Whether the result is unpacked into ``targets``, one for each of its items.
        effect: Whether it must run even if nobody needs its values.
    """

    targets: tuple[str, ...]
    expression: str
    uses: tuple[str, ...]
    unpack: bool = False
    effect: bool = True


def value_mark(name: str) -> str:
    """Write a value in an expression, to be replaced by the variable that it lives in."""
    return f"{_MARK}{name}{_MARK}"


def body_lines(
    parameters: Sequence[str], statements: Sequence[Statement], result: str, kept: Iterable[str]
) -> list[str]:
    """Write a function's body, freeing each value right after its last use.

    A value takes the variable of one that the same statement uses last: assigning frees the old
    value, at the same point as a ``del`` would and without one. What the return reads is not freed:
    the frame that ends does that.

    Args:
        parameters: Names of the arguments.
        statements: In the order in which they run; each name is assigned once.
        result: Source text of the returned value.
        kept: Names of the values that ``result`` reads.

    Returns:
        Source lines, indented by one level.
    """
    needed = set(kept)
    backwards: list[tuple[Statement, list[bool], list[str]]] = []
    for statement in reversed(statements):
        live = [name in needed for name in statement.targets]
        if not (statement.effect or any(live)):
            continue
        # dict keeps the order of first use, so the text does not depend on hashing.
        last = [name for name in dict.fromkeys(statement.uses) if name not in needed]
        needed.update(last)
        backwards.append((statement, live, last))
    unused = [name for name in parameters if name not in needed]
    lines = [f"{INDENT}del {', '.join(unused)}"] if unused else []
    variables = {name: name for name in parameters}
    for statement, live, last in reversed(backwards):
        lines += _render(statement, live, last, variables)
    lines.append(f"{INDENT}return {_placed(result, variables)}")
    return lines


def _placed(expression: str, variables: dict[str, str]) -> str:
    return _MARKED.sub(lambda mark: variables[mark[1]], expression)


def _render(
    statement: Statement, live: Sequence[bool], last: Sequence[str], variables: dict[str, str]
) -> list[str]:
    text = _placed(statement.expression, variables)
    freed = [variables.pop(name) for name in last]
    names = []
    for name, alive in zip(statement.targets, live, strict=True):
        if alive:
            variables[name] = freed.pop(0) if freed else name
        names.append(variables[name] if alive else THROWAWAY)
    if statement.unpack and any(live):
        text = f"{', '.join(names)}{',' if len(names) == 1 else ''} = {text}"
        if not all(live):
            freed.append(THROWAWAY)
    elif any(live):
        text = f"{names[0]} = {text}"
    # Where a value has moved in with another name, the graph's own name stands beside it.
    own = all(variable in (name, THROWAWAY) for name, variable in zip(statement.targets, names, strict=True))
    comment = "" if own else f"  # {', '.join(statement.targets)}"
    lines = [f"{INDENT}{text}{comment}"]
    if freed:
        lines.append(f"{INDENT}del {', '.join(freed)}")
    return lines
