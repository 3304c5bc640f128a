"""No edit may lead to a wrong hit: at least 60 of them, each in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from keys_edits import AFTER, FILES, HARMLESS, all_edits


@pytest.fixture(scope="module")
def results():
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": str(here.parent.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, str(here / "keys_forks.py")],
        input=json.dumps(all_edits()),
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_project_itself_can_be_looked_up_directly(results):
    base = results[0]
    assert "error" not in base, base
    assert base["reason"] is None
    assert base["unsound"] is None


def test_every_edit_could_be_made(results):
    assert [result for result in results if "error" in result] == []


def test_no_edit_gives_a_wrong_hit(results):
    base = results[0]
    hits = [result for result in results[1:] if result.get("hit")]
    wrong = [result["name"] for result in hits if result["graph"] != base["graph"]]
    assert wrong == []


def test_edits_are_many_and_most_change_the_graph(results):
    assert len(FILES) + len(AFTER) >= 60
    base = results[0]
    changed = [
        r for r in results[1:] if r.get("graph") != base["graph"] and not r["name"].startswith("harmless")
    ]
    assert len(changed) >= 60


def test_every_miss_says_why(results):
    silent = [
        r["name"]
        for r in results[1:]
        if "hit" in r and not r["hit"] and not r.get("differ") and not r.get("reason")
    ]
    assert silent == []


@pytest.mark.parametrize("name", [name for name, _ in HARMLESS])
def test_what_means_nothing_still_hits(results, name):
    (result,) = (r for r in results if r["name"] == f"harmless: {name}")
    assert "error" not in result, result
    assert result["hit"], (result.get("differ"), result["reason"])
