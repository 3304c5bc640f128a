"""Statements of generated code, and where each value is freed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

INDENT = "    "
THROWAWAY = "_"


@dataclass(frozen=True, slots=True)
class Statement:
    """One assignment, before it is known which of its values anybody needs.

    Args:
        targets: Local names that it assigns.
        expression: Source text of the right side.
        uses: Local names that the right side reads.
        unpack: Whether the result is unpacked into ``targets``, one for each of its items.
        effect: Whether it must run even if nobody needs its values.
    """

    targets: tuple[str, ...]
    expression: str
    uses: tuple[str, ...]
    unpack: bool = False
    effect: bool = True


def body_lines(
    parameters: Sequence[str], statements: Sequence[Statement], result: str, kept: Iterable[str]
) -> list[str]:
    """Write a function's body, freeing each value right after its last use.

    What the return reads is not freed: the frame that ends does that.

    Args:
        parameters: Local names that hold the arguments.
        statements: In the order in which they run; each name is assigned once.
        result: Source text of the returned value.
        kept: Local names that ``result`` reads.

    Returns:
        Source lines, indented by one level.
    """
    needed = set(kept)
    backwards: list[list[str]] = []
    for statement in reversed(statements):
        live = [name in needed for name in statement.targets]
        if not (statement.effect or any(live)):
            continue
        # dict keeps the order of first use, so the text does not depend on hashing.
        last = [name for name in dict.fromkeys(statement.uses) if name not in needed]
        needed.update(last)
        backwards.append(_render(statement, live, last))
    unused = [name for name in parameters if name not in needed]
    lines = [f"{INDENT}del {', '.join(unused)}"] if unused else []
    for group in reversed(backwards):
        lines += group
    lines.append(f"{INDENT}return {result}")
    return lines


def _render(statement: Statement, live: Sequence[bool], last: Sequence[str]) -> list[str]:
    freed = list(last)
    if not any(live):
        text = statement.expression
    elif statement.unpack:
        names = [name if alive else THROWAWAY for name, alive in zip(statement.targets, live, strict=True)]
        text = f"{', '.join(names)}{',' if len(names) == 1 else ''} = {statement.expression}"
        if not all(live):
            freed.append(THROWAWAY)
    else:
        text = f"{statement.targets[0]} = {statement.expression}"
    lines = [f"{INDENT}{text}"]
    if freed:
        lines.append(f"{INDENT}del {', '.join(freed)}")
    return lines
