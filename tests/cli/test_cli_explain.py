"""``stitchcache explain`` and ``stitchcache diff``."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest
from cli_entries import CODE, artifact, entry_file, key, put, put_target

from stitchcache.cache import Cache
from stitchcache.types import Factor

TARGETS = """
import torch, stitchcache, layers

def made(model):
    return lambda: (model.eval(), (torch.ones(3),))

served = stitchcache.Target("served", made(layers.Scaled(2.0)), backend="eager")
clocked = stitchcache.Target("clocked", made(layers.Clocked()), backend="eager")
other = stitchcache.Target("other", made(layers.Scaled(5.0)), backend="eager")
broken = stitchcache.Target("broken", lambda: 1 / 0, backend="eager")
known = [served, clocked]
every = [served, clocked, broken, other]
"""
LAYERS = """
import time, torch

class Scaled(torch.nn.Module):
    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        return x * self.rate + 1

class Clocked(torch.nn.Module):
    def forward(self, x):
        time.time()
        return x
"""


# ---- a target


@pytest.fixture(scope="module")
def project(tmp_path_factory, run_cli):
    folder = tmp_path_factory.mktemp("project")
    (folder / "targets.py").write_text(TARGETS)
    (folder / "layers.py").write_text(LAYERS)
    (folder / "cache").mkdir(mode=0o755)
    done = run_cli("prewarm", "targets.py:known", "--cache", folder / "cache", cwd=folder)
    assert done.status == 0, done.err
    return folder


def test_a_target_that_starts_warm(run_cli, project):
    outcome = run_cli("explain", "targets.py:served", "--factors", "--cache", project / "cache", cwd=project)
    assert outcome.status == 0, outcome.err
    lines = [" ".join(line.split()) for line in outcome.out.splitlines()]
    assert "target served" in lines
    assert "verdict direct hit" in lines
    assert "model.attributes.layers.Scaled.rate 2.0" in lines
    assert any(line.startswith("env.torch ") for line in lines)


def test_every_verdict_and_an_edited_source(run_cli, project, tmp_path):
    for name in ("targets.py", "layers.py"):
        (tmp_path / name).write_bytes((project / name).read_bytes())
    words = ("explain", "targets.py:every", "--cache", project / "cache", "--json")
    first = run_cli(*words, cwd=tmp_path)
    assert first.status == 1
    served, clocked, other = first.json["targets"]
    (broken,) = first.json["failed"]
    assert (broken["name"], broken["type"]) == ("broken", "TargetError")
    assert (served["verdict"], served["reason"], served["trace"]) == ("direct", "", None)
    assert clocked["verdict"] == "off"
    assert "time.time" in clocked["reason"]
    assert (other["verdict"], other["graph_hash"]) == ("miss", None)
    near = other["nearest"][0]
    assert near["graph_hash"] == served["graph_hash"]
    assert near["differences"] == [
        {"name": "model.attributes.layers.Scaled.rate", "old": "2.0", "new": "5.0"}
    ]
    file = tmp_path / "layers.py"
    old = hashlib.sha256(file.read_bytes()).hexdigest()
    # A comment leaves the key as it is, and a constant is part of it.
    file.write_text(f"{LAYERS}# a comment\n")
    (commented, *_) = run_cli(*words, cwd=tmp_path).json["targets"]
    assert commented["reason"] == f"{file} (layers) is not the file that was captured"
    assert [found["path"] for found in commented["changed"]] == [str(file)]
    file.write_text(LAYERS.replace("+ 1", "+ 2"))
    new = hashlib.sha256(file.read_bytes()).hexdigest()
    second = run_cli(*words[:-1], "--trace", cwd=tmp_path)
    assert second.status == 1
    assert "build() failed: ZeroDivisionError" in second.err
    lines = [" ".join(line.split()) for line in second.out.splitlines()]
    assert "reason no entry for this target" in lines
    assert any(line.startswith("model.code.layers Scaled [") for line in lines)
    assert f"{file} {old[:12]} {new[:12]}" in lines
    assert "in the cache no" in lines
    assert any(line.startswith("graph.pieces ") for line in lines)
    assert "verdict direct lookup is off" in lines


def test_what_is_neither_a_target_nor_a_key(run_cli, tmp_path):
    for words in (["clock"], ["no/such/file.py:name"], ["abc", "--trace"]):
        outcome = run_cli("explain", *words, "--cache", tmp_path)
        assert outcome.status == 2, outcome.err
        assert words[0] in outcome.err or "--trace" in outcome.err


# ---- a key


@pytest.fixture
def root(tmp_path):
    put(tmp_path, key("a"), "Decoder")
    put_target(tmp_path, "t1", key("a"), {"model.class": "m.Decoder", "options.backend": "aoti"}, created=9.0)
    put_target(tmp_path, "t2", key("a"), {"model.class": "m.Decoder"}, refused="it reads a clock")
    put(tmp_path, key("b"), "Decoder2")
    put_target(tmp_path, "t3", key("b"), {"model.class": "m.Decoder", "options.backend": "eager"})
    return tmp_path


def test_an_entry_with_all_that_leads_to_it(run_cli, root):
    outcome = run_cli("explain", key("a")[:8], "--cache", root)
    assert outcome.status == 0, outcome.err
    text = [" ".join(line.split()) for line in outcome.out.splitlines()]
    assert f"graph hash {key('a')}" in text
    assert any(line.startswith(key("t1")[:12]) and line.endswith("yes") for line in text)
    assert any(line.startswith(key("t2")[:12]) and "no: it reads a clock" in line for line in text)
    assert f"mylib.model 321 B {key('source')[:12]}" in text
    record = run_cli("explain", key("a"), "--json", "--cache", root).json
    assert (record["kind"], record["key"]) == ("entry", key("a"))
    assert {target["target_key"] for target in record["targets"]} == {key("t1"), key("t2")}
    assert [near["graph_hash"] for near in record["nearest"]] == [key("b")]
    assert record["factors"][0]["name"] == "env.torch"


def test_a_target_key(run_cli, root):
    record = run_cli("explain", key("t1")[:12], "--json", "--cache", root).json
    assert (record["kind"], record["key"], record["graph_hash"]) == ("target", key("t1"), key("a"))
    assert [factor["value"] for factor in record["factors"]] == ["m.Decoder", "aoti"]
    others = {near["target_key"]: near["differences"] for near in record["nearest"]}
    assert others[key("t3")] == [{"name": "options.backend", "old": "eager", "new": "aoti"}]
    assert key("t1") not in others
    out = run_cli("explain", key("t1")[:12], "--cache", root).out
    assert "options.backend  eager  aoti" in out


def test_a_target_whose_entry_is_gone_is_a_finding(run_cli, root):
    entry_file(root, key("b")).unlink()
    outcome = run_cli("explain", key("t3"), "--cache", root)
    assert outcome.status == 1
    assert "no entry in" in outcome.out


def test_keys_that_mean_nothing_or_too_much(run_cli, root):
    missing = run_cli("explain", "0123456789", "--cache", root)
    assert missing.status == 1
    assert "no entry and no target" in missing.err
    first = "ab" + "0" * 62
    put(root, first, "First")
    put(root, "ab" + "1" * 62, "Second")
    outcome = run_cli("explain", "ab", "--cache", root)
    assert outcome.status == 1
    assert f"{first}  entry" in outcome.err


# ---- two entries


def changed_entry(root):
    """An entry B that differs from A in a factor, an input, a binding, a line of code and a piece."""
    cache = Cache(root)
    made = artifact(cache, key("b"), "Model", blobs=2)
    blob = cache.put_blob(b"another piece")
    variant = made.variants[0]
    last = dataclasses.replace(variant.pieces[2], key=key("new piece"), blob=blob)
    assert made.input_spec is not None
    leaf = dataclasses.replace(made.input_spec.leaves[3], value=False)
    cache.put(
        dataclasses.replace(
            made,
            variants=(
                dataclasses.replace(
                    variant, code=CODE.replace("return x", "return x + 1"), pieces=(*variant.pieces[:2], last)
                ),
            ),
            input_spec=dataclasses.replace(made.input_spec, leaves=(*made.input_spec.leaves[:3], leaf)),
            bindings=made.bindings[:1],
            factors=(made.factors[0], Factor(name="options.backend", value="eager", digest=key("eager"))),
        )
    )


def test_diff(run_cli, tmp_path):
    put(tmp_path, key("a"), "Model")
    changed_entry(tmp_path)
    outcome = run_cli("diff", key("a")[:8], key("b")[:8], "--cache", tmp_path)
    assert outcome.status == 1, outcome.err
    lines = outcome.out.splitlines()
    squeezed = [" ".join(line.split()) for line in lines]
    assert "options.backend aoti eager" in squeezed
    assert "input flag must be True must be False" in squeezed
    assert "buffer scale float32[4, 4] cpu (absent)" in squeezed
    assert "-        return x" in lines
    assert "+        return x + 1" in lines
    assert [line.split()[-4:-2] for line in lines[-3:]] == [["2", "3"], ["0", "0"], ["1", "1"]]
    record = run_cli("diff", key("a"), key("b"), "--json", "--cache", tmp_path).json
    assert record["same"] is False
    assert [len(record["pieces"][part]) for part in ("shared", "only_a", "only_b")] == [2, 0, 1]
    assert record["pieces"]["only_b"][0]["calls"] == ["submod_4"]
    assert record["factors"] == [{"name": "options.backend", "old": "aoti", "new": "eager"}]
    assert record["a"]["blob_bytes"] != record["b"]["blob_bytes"]


def test_diff_of_one_entry_and_of_none(run_cli, tmp_path):
    put(tmp_path, key("a"), "Model")
    same = run_cli("diff", key("a")[:8], key("a"), "--cache", tmp_path)
    assert same.status == 0
    assert "They are the same entry." in same.out
    missing = run_cli("diff", key("a"), "0123", "--cache", tmp_path)
    assert (missing.status, missing.out) == (2, "")
    assert "begins with 0123" in missing.err


def test_an_entrys_own_name_in_its_code_is_no_difference(run_cli, tmp_path):
    cache = Cache(tmp_path)
    for name in ("a", "b"):
        made = artifact(cache, key(name))
        code = f"# graph {key(name)}\n{CODE}"
        cache.put(dataclasses.replace(made, variants=(dataclasses.replace(made.variants[0], code=code),)))
    outcome = run_cli("diff", key("a"), key("b"), "--cache", tmp_path)
    assert outcome.status == 1
    assert "Nothing that is recorded in them differs." in outcome.out
