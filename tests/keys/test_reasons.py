"""Every reason for a lost direct hit says what to change, and docs/keys.md lists it."""

import ast
import pathlib

import pytest

import stitchcache

PACKAGE = pathlib.Path(stitchcache.__file__).parent
DOCS = pathlib.Path(__file__).parents[2] / "docs" / "keys.md"
FILES = [*sorted((PACKAGE / "keys").glob("*.py")), PACKAGE / "containers.py", PACKAGE / "encoding.py"]
GIVE_REASONS = {"refuse", "_refuse", "error", "UnkeyableError"}
NOT_FOR_LONG = (
    "since the capture",
    "this worked at the capture",
    "is not the file that was captured",
    "of no known kind",
    "cannot be found",
)
"""What tells of a change since the capture: the start that says so traces, and the next is direct again."""


def text_of(node):
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def written_in(file):
    """Texts that a file gives as reasons, and texts with an advice that it puts together with others."""
    tree = ast.parse(file.read_text())
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in GIVE_REASONS and text_of(node.args[-1]):
                yield text_of(node.args[-1])
        elif (
            isinstance(node, ast.JoinedStr | ast.Constant) and id(node) not in told and "; " in text_of(node)
        ):
            yield text_of(node)


def reasons():
    found = {" ".join(text.split()) for file in FILES for text in written_in(file)}
    pieces = {text for text in found if text.endswith("...") or text.startswith("...;")}
    whole = {text for text in found - pieces if not any(part in text for part in NOT_FOR_LONG)}
    # A part of a longer text that has it all.
    return sorted(text for text in whole if not any(text != other and text in other for other in whole))


def listed():
    block = (
        DOCS.read_text().partition("### What a start says")[2].partition("```text\n")[2].partition("```")[0]
    )
    return block.splitlines()


@pytest.mark.parametrize("reason", reasons())
def test_a_reason_says_what_to_change(reason):
    before, found, advice = reason.rpartition("; ")
    assert found, reason
    assert before, reason
    assert advice[0].islower(), reason


def test_the_page_lists_every_reason_and_no_other():
    assert listed() == reasons()
