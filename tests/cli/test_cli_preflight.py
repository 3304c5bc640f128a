"""``stitchcache machine`` and ``check``, as a node and a CI job run them."""

import json

import pytest

TARGET = """
import torch
import stitchcache

def build():
    return torch.nn.Linear(4, 4).eval(), (torch.zeros(2, 4),)

target = stitchcache.Target("linear", build, backend="eager")
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory, run_cli):
    folder = tmp_path_factory.mktemp("node")
    (folder / "targets.py").write_text(TARGET)
    node = run_cli("machine")
    (folder / "node.json").write_text(node.out)
    changed = json.loads(node.out)
    for factor in changed["factors"]:
        if factor["name"] == "env.python":
            factor.update(value="cpython 3.99", digest="0" * 64)
    (folder / "other.json").write_text(json.dumps(changed))
    prewarmed = run_cli("prewarm", f"{folder}/targets.py:target", "--cache", folder / "cache")
    assert prewarmed.status == 0, prewarmed.err
    return folder


def test_a_machine_says_nothing_of_who_or_where_it_is(made):
    import getpass
    import socket

    text = (made / "node.json").read_text()
    assert json.loads(text)["kind"] == "stitchcache machine"
    for private in (socket.gethostname(), str(made), f"/home/{getpass.getuser()}"):
        assert private not in text


def test_entries_are_checked_without_torch(made, run_cli):
    fine = run_cli("check", made / "cache", "--machine", made / "node.json")
    assert (fine.status, "all hit there" in fine.err + fine.out) == (0, True)
    other = run_cli("check", made / "cache", "--machine", made / "other.json", "--json")
    assert (other.status, other.json["missed"]) == (1, 1)
    (entry,) = other.json["entries"]
    assert [each["name"] for each in entry["differences"]] == ["env.python"]
    text = run_cli("check", "--cache", made / "cache", "--machine", made / "other.json").out
    assert "env.python" in text
    assert "cpython 3.99" in text
    light = run_cli(
        "check", made / "cache", "--machine", made / "node.json", env={"PYTHONPROFILEIMPORTTIME": "1"}
    )
    assert " torch\n" not in light.err


def test_targets_are_looked_up_as_there(made, run_cli):
    target = f"{made}/targets.py:target"
    fine = run_cli("check", made / "cache", "--machine", made / "node.json", "--target", target)
    assert (fine.status, "direct hit" in fine.out) == (0, True), fine.err
    other = run_cli("check", made / "cache", "--machine", made / "other.json", "--target", target, "--json")
    assert other.status == 1
    assert other.json["targets"][0]["reason"] == "no entry for this target there"


def test_what_is_missing_is_said(made, run_cli):
    assert run_cli("check", made / "cache").status == 2
    nothing = run_cli("check", made / "cache", "--machine", made / "nothing.json")
    assert (nothing.status, "stitchcache machine > FILE" in nothing.err) == (2, True)
    gone = run_cli("check", "--cache", made / "gone", "--machine", made / "node.json")
    assert (gone.status, "no such directory" in gone.err) == (2, True)


def test_an_empty_cache_does_not_pass(made, run_cli, tmp_path):
    """A mount that is missing leaves an empty directory: all would be cold."""
    (tmp_path / "cache").mkdir()
    text = run_cli("check", tmp_path / "cache", "--machine", made / "node.json")
    assert (text.status, "0 entries, nothing will hit there" in text.out + text.err) == (1, True)
    assert run_cli("check", tmp_path / "cache", "--machine", made / "node.json", "--json").status == 1
