"""``stitchcache prewarm``, with the eager backend: compiling is not the point here."""

from __future__ import annotations

import textwrap

import pytest

TARGETS = """
import torch
from stitchcache import Dim, Target


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x):
        return torch.relu(self.linear(x)).sum(1)


def build():
    return Net().eval(), (torch.ones(3, 4),)


SHAPES = ({0: Dim("rows", 1, 64)},)
net = Target("net", build, dynamic_shapes=SHAPES, backend="eager", splitting_ops=["aten::relu"])
typo = Target("typo", build, dynamic_shapes=SHAPES, backend="eager", splitting_ops=["aten::nonsense"])
wrong = Target("wrong", lambda: 3, backend="eager")


def both():
    return [net, typo]


twice = [net, net]
number = 3
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    path = tmp_path_factory.mktemp("project")
    (path / "nets.py").write_text(textwrap.dedent(TARGETS))
    return path


@pytest.fixture(scope="module")
def first(run_cli, project):
    """The first prewarm: the module's cache is filled by it."""
    return run_cli("prewarm", "-v", "nets.py:net", "--cache", project / "cache", cwd=project)


def test_a_target_is_compiled(first):
    assert first.status == 0, first.err
    heading, line = first.out.splitlines()
    assert heading.split() == ["TARGET", "STATUS", "STORED", "GRAPH", "CALLS", "DIFFERENT", "SIZE", "TIME"]
    assert line.split()[:2] == ["net", "compiled"]
    assert "\x1b" not in first.err


def test_progress_is_plain_lines(first):
    said = first.err.splitlines()
    assert said[0] == "net: build"
    assert "net: capture" in said
    assert any(line.startswith("net: compile 0/") for line in said)
    assert any("no direct hit" in line for line in said)
    assert said[-1].startswith("net: compiled in ")


def test_without_weights_the_entry_is_the_same(run_cli, project, first, tmp_path):
    faked = run_cli("prewarm", "--fake", "nets.py:net", "--json", "--cache", tmp_path, cwd=project)
    assert faked.status == 0, faked.err
    (result,) = faked.json["targets"]
    assert result["status"] == "compiled"
    assert result["graph_hash"][:12] in first.out
    real = run_cli("prewarm", "--require", "nets.py:net", "--cache", tmp_path, cwd=project)
    assert "hit direct" in real.out


def test_no_time_left_is_told_before_a_piece_is_done(run_cli, project, first):
    """Also where an earlier run has compiled pieces: they may have been smaller."""
    assert "left" not in first.err
    again = "import nets, dataclasses\nother = dataclasses.replace(nets.net, splitting_ops=())\n"
    (project / "other.py").write_text(again)
    said = run_cli("prewarm", "other.py:other", "--cache", project / "cache", cwd=project).err
    steps = ["net: compile 0/1", "net: compile 1/1"]
    assert [line for line in said.splitlines() if line.startswith("net: compile ")] == steps


def test_the_second_time_is_a_direct_hit(run_cli, project, first):
    outcome = run_cli("prewarm", "nets.py:net", "--json", "--cache", project / "cache", cwd=project)
    assert outcome.status == 0, outcome.err
    (result,) = outcome.json["targets"]
    assert (result["name"], result["status"], result["error"]) == ("net", "direct", None)
    assert result["graph_hash"][:12] in first.out
    again = run_cli("prewarm", "nets.py:net", "--require", "--cache", project / "cache", cwd=project)
    assert again.status == 0, again.err
    assert "hit direct" in again.out


def test_require_compiles_nothing(run_cli, project, tmp_path):
    outcome = run_cli("prewarm", "nets.py:net", "--require", "--cache", tmp_path, cwd=project)
    assert outcome.status == 1
    assert "failed" in outcome.out
    assert "not in the cache" in outcome.err


def test_one_failure_does_not_stop_the_others(run_cli, project, first):
    outcome = run_cli(
        "prewarm", "nets.py:both", "nets.py:wrong", "--json", "--cache", project / "cache", cwd=project
    )
    assert outcome.status == 1
    statuses = {result["name"]: result["status"] for result in outcome.json["targets"]}
    assert statuses == {"net": "direct", "typo": "failed", "wrong": "failed"}
    assert outcome.json["targets"][1]["error"]["type"] == "SplittingOpNotFoundError"


def test_failures_are_explained(run_cli, project, tmp_path):
    outcome = run_cli("prewarm", "nets.py:typo", "--cache", tmp_path, cwd=project)
    assert outcome.status == 1
    assert "aten::nonsense" in outcome.err


def not_stored(outcome) -> list[str]:
    assert outcome.status == 1, outcome.err
    return [target["error"]["message"] for target in outcome.json["targets"] if not target["stored"]]


def test_what_is_not_stored_is_a_finding(run_cli, project, first, tmp_path):
    assert first.out.splitlines()[0].split()[2] == "STORED"
    assert first.out.splitlines()[1].split()[2] == "yes"
    words = ("prewarm", "--json", "nets.py:net")
    (said,) = not_stored(run_cli(*words, cwd=project, env={"STITCHCACHE_READONLY": "1"}))
    assert "compiled, and not stored" in said
    assert "read-only" in said
    (said,) = not_stored(run_cli(*words, cwd=project, env={"STITCHCACHE_MAX_SIZE": "1K"}))
    assert "limits" in said
    (tmp_path / "entries").write_text("")
    (said,) = not_stored(run_cli(*words, "--cache", tmp_path, cwd=project))
    assert "a file stands where a directory should be" in said
    plain = run_cli("prewarm", "nets.py:net", "--cache", tmp_path, cwd=project)
    assert plain.out.splitlines()[1].split()[1:3] == ["compiled", "no"]
    assert "not stored" in plain.err.splitlines()[-1]


def test_a_cache_that_others_can_write_stores_nothing_of_use(run_cli, project, tmp_path):
    tmp_path.chmod(0o777)
    (said,) = not_stored(run_cli("prewarm", "--json", "nets.py:net", "--cache", tmp_path, cwd=project))
    assert "chmod go-w" in said


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("nowhere.py:net", "there is no file nowhere.py"),
        ("no_such_module:net", "no module 'no_such_module'"),
        ("nets.py:missing", "has no 'missing'"),
        ("nets.py", "is not a target"),
        ("nets.py:number", "is or holds a int"),
        ("nets.py:twice", "two targets are called 'net'"),
    ],
)
def test_references_that_lead_nowhere(run_cli, project, tmp_path, reference, said):
    outcome = run_cli("prewarm", reference, "--cache", tmp_path, cwd=project)
    assert outcome.status == 2
    assert said in outcome.err
    assert outcome.err.count("\n") == 1


def test_usage(run_cli):
    assert run_cli("prewarm").status == 2
    assert run_cli("prewarm", "--jobs", "0", "a:b").status == 2


def test_a_terminal_gets_live_lines(run_on_terminal, project, first, monkeypatch):
    monkeypatch.chdir(project)
    shown = run_on_terminal("prewarm", "nets.py:net", "--cache", project / "cache")
    assert "hit direct" in shown
    assert "\x1b[" in shown


@pytest.mark.parametrize("shard", ["3/3", "1", "-1/3", "a/b", "0/0", "1/"])
def test_a_shard_that_makes_no_sense_is_usage(run_cli, project, shard):
    outcome = run_cli("prewarm", "nets.py:net", "--shard", shard, cwd=project)
    assert (outcome.status, "such as 0/4" in outcome.err) == (2, True)
