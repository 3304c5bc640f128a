# ruff: noqa: E501 - a list of names
"""What a model may read without naming it: never a wrong hit, and a reason where there is no direct lookup."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from keys_traps import TRAPS

# What is recorded and checked, so that the model can still be looked up directly.
DIRECT = {
    "command line", "import path", "computed attribute of a module", "number of threads", "seed of torch", "rank",
    "registered subclass", "metadata of a dataclass", "annotations", "variable as bytes", "variable in a mapping",
    "property of the class", "descriptor", "__getattr__ of the model", "closure in a hook",
    "pre-hook with keywords", "object called by a hook", "decorator's state", "attribute of a partial",
    "slots of a configuration", "number of numpy", "context variable", "metaclass", "enumeration's attribute",
    "enumeration member's attribute", "attribute of an exception class", "dispatch by type", "pruned weight",
    "old weight norm", "chain through a class", "module in a list", "keyword default of a helper",
    "code of a helper", "function of the library", "constant of the library", "warning filters",
    "dtype of a default", "reload",
}  # fmt: skip


@pytest.fixture(scope="module")
def results():
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": str(here.parent.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, str(here / "keys_traps.py")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return {result["name"]: result for result in json.loads(done.stdout)}


@pytest.mark.parametrize("name", TRAPS)
def test_no_wrong_hit(results, name):
    base, same, edited = (results[name][key] for key in ("base", "same", "edited"))
    assert "error" not in base, base
    off = base["unsound"] or base["reason"]
    assert (off is None) == (name in DIRECT), off
    if off is None:
        assert same["hit"], (same.get("differ"), same["reason"])
        assert "error" not in edited, edited
        assert edited["graph"] != base["graph"]
        assert not edited["hit"]
        assert edited.get("differ") or edited["reason"]
