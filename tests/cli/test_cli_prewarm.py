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


# -- shards ----------------------------------------------------------------------------------------

SHARED = """
import torch
from stitchcache import Target


class Deep(torch.nn.Module):
    def __init__(self, *widths):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, width) for width in widths)

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x[:, :8]))
        return x


def made(name, *widths):
    build = lambda: (Deep(*widths).eval(), (torch.ones(3, 8),))
    return Target(name, build, backend="eager", splitting_ops=["aten::relu"])


targets = [made("one", 8, 9, 10, 11), made("two", 12, 9, 13, 10), made("three", 14, 8, 15)]
lazy = Target("lazy", lambda: (Deep(8).eval(), (torch.ones(3, 8),)), backend="eager", torch_compile={})
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    path = tmp_path_factory.mktemp("shared")
    (path / "deep.py").write_text(SHARED)
    return path


def compiled_pieces(run_cli, root) -> int:
    return run_cli("stats", "--json", "--cache", root).json["counters"].get("piece.compiled.eager", 0)


def test_shards_that_know_nothing_of_each_other_compile_each_piece_once(run_cli, shared, tmp_path):
    whole = run_cli("prewarm", "deep.py:targets", "--json", "--cache", tmp_path / "whole", cwd=shared)
    assert whole.status == 0, whole.err
    distinct = {path.name for path in (tmp_path / "whole" / "pieces").glob("*/*")}
    assert len(distinct) == compiled_pieces(run_cli, tmp_path / "whole")
    by_shard = []
    for index in range(3):
        root = tmp_path / f"shard{index}"
        words = ("deep.py:targets", "deep.py:lazy", "--shard", f"{index}/3", "--json", "--cache", root)
        shard = run_cli("prewarm", *words, cwd=shared)
        assert shard.status == 0, shard.err
        results = {each["name"]: each for each in shard.json["targets"]}
        assert {name: each["status"] for name, each in results.items()} == {
            **dict.fromkeys(("one", "two", "three"), "shard"),
            "lazy": "left",
        }
        assert not (root / "entries").exists()
        by_shard.append({path.name for path in (root / "pieces").glob("*/*")})
        assert compiled_pieces(run_cli, root) == len(by_shard[-1])
    assert sum(map(len, by_shard)) == len(distinct)
    assert set.union(*by_shard) == distinct
    # Their directories as layers: nothing is compiled, and the entries are those of one process.
    layers = ":".join(str(tmp_path / name) for name in ("all", "shard0", "shard1", "shard2"))
    joined = run_cli("prewarm", "deep.py:targets", "--json", "--cache", layers, cwd=shared)
    assert joined.status == 0, joined.err
    assert [each["graph_hash"] for each in joined.json["targets"]] == [
        each["graph_hash"] for each in whole.json["targets"]
    ]
    assert compiled_pieces(run_cli, tmp_path / "all") == 0
    again = run_cli("prewarm", "deep.py:targets", "--shard", "1/3", "--json", "--cache", layers, cwd=shared)
    assert {each["status"] for each in again.json["targets"]} == {"direct"}


def test_a_shard_that_stores_nothing_fails(run_cli, shared, tmp_path):
    words = ("prewarm", "deep.py:targets", "--shard", "0/1", "--cache", tmp_path)
    outcome = run_cli(*words, cwd=shared, env={"STITCHCACHE_READONLY": "1"})
    assert (outcome.status, "are not stored" in outcome.err) == (1, True), outcome.err
    outcome = run_cli(*words, "--require", cwd=shared)
    assert (outcome.status, "not in the cache" in outcome.err) == (1, True), outcome.err


@pytest.mark.parametrize("shard", ["3/3", "1", "-1/3", "a/b", "0/0", "1/"])
def test_a_shard_that_makes_no_sense_is_usage(run_cli, shared, shard):
    outcome = run_cli("prewarm", "deep.py:targets", "--shard", shard, cwd=shared)
    assert (outcome.status, "such as 0/4" in outcome.err) == (2, True)
