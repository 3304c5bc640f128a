"""Foretold hits and misses are what a start on that machine would be."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import stitchcache
from stitchcache.encoding import make_factor
from stitchcache.errors import OptionError
from stitchcache.keys import environment
from stitchcache.report.preflight import check_target, machine_record, preflight, read_machine, verdict_record


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) * 2


def build():
    return Scaled().eval(), (torch.zeros(2, 4),)


TARGET = stitchcache.Target("scaled", build, backend="eager")
OTHERS = {
    "env.torch": "2.99.0",
    "env.python": "cpython 3.99",
    "env.libc": "glibc 2.1",
    "env.cpu": "AVX2, 9 instruction sets",
    "env.platform": "linux aarch64 little",
    "env.numpy": "9.9",
    "env.variables": "TORCHINDUCTOR_MAX_AUTOTUNE=1",
    "env.op_libraries": "1 loaded by path",
    "env.cxx_abi": "False",
    "env.schema": "99",
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    cache = stitchcache.Cache(tmp_path_factory.mktemp("preflight"))
    assert stitchcache.prewarm([TARGET], cache=cache).ok
    return cache


@pytest.fixture
def here(tmp_path):
    def write(**changed):
        record = machine_record()
        for factor in record["factors"]:
            if factor["name"] in changed:
                value = changed[factor["name"]]
                factor.update(value=value, digest=make_factor(factor["name"], value).digest)
        path = tmp_path / "node.json"
        path.write_text(json.dumps(record))
        return read_machine(path)

    return write


def test_this_machine_hits(cache, here):
    (verdict,) = preflight(cache, here())
    assert (verdict.label, verdict.hit, dict(verdict.differences), dict(verdict.settings)) == (
        "scaled",
        True,
        {},
        {},
    )
    assert preflight(cache.root, here()) == [verdict]
    found = check_target(TARGET, cache, here())
    assert (found["hit"], found["graph_hash"]) == (True, verdict.graph_hash)


@pytest.mark.parametrize("name", OTHERS)
def test_another_machine_is_foretold_as_a_start_there_would_go(cache, here, name, monkeypatch):
    """What is foretold is what a lookup with that machine's factors finds."""
    there = here(**{name: OTHERS[name]})
    (verdict,) = preflight(cache, there)
    found = check_target(TARGET, cache, there)
    real = environment.environment_factors

    def factors_there(backend, devices):
        for factor in real(backend, devices):
            yield there[factor.name]

    monkeypatch.setattr("stitchcache.keys.environment_factors", factors_there)
    model, args = build()
    start = stitchcache.compile(
        model, args, backend="eager", cache=stitchcache.Cache(cache.root, read_only=True)
    )
    foretold = "direct" if verdict.hit else None
    assert (start.cache_hit == "direct") == verdict.hit == found["hit"], (foretold, start.cache_hit, found)
    if not verdict.hit:
        assert list(verdict.differences) == [name]
        assert verdict.differences[name][1].startswith(OTHERS[name])
        assert [each["name"] for each in found["nearest"][0]["differences"]] == [name]


def test_settings_of_the_program_are_told_apart(tmp_path, here):
    cache, precision = stitchcache.Cache(tmp_path / "cache"), torch.get_float32_matmul_precision()
    there = here()
    torch.set_float32_matmul_precision("high")
    try:
        assert stitchcache.prewarm([TARGET], cache=cache).ok
    finally:
        torch.set_float32_matmul_precision(precision)
    (verdict,) = preflight(cache, there)
    assert verdict.hit
    assert list(verdict.settings) == ["torch.float32_precision"]
    assert verdict_record(verdict)["settings"][0]["name"] == "torch.float32_precision"
    assert not check_target(TARGET, cache, there)["hit"], "here the program does not set it"


def test_an_entry_of_an_older_format_is_no_hit(tmp_path, cache, here):
    (key,) = [header.graph_hash for header in cache.entries()]
    other = stitchcache.Cache(tmp_path / "cache")
    artifact = cache.get(key)
    for blob in artifact.blobs:
        other.put_blob(cache.blob_path(blob))
    other.put(replace(artifact, factors=()))
    assert [verdict.hit for verdict in preflight(other, here())] == [False]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"kind": "x"}', '{"kind": "stitchcache machine", "factors": [1]}']
)
def test_a_file_that_is_something_else(tmp_path, text):
    path = tmp_path / "node.json"
    path.write_text(text)
    with pytest.raises(OptionError, match="Run 'stitchcache machine > FILE' on that machine"):
        read_machine(path)


def test_a_source_that_is_something_else(tmp_path, here):
    path = tmp_path / "some.txt"
    path.write_text("no bundle")
    with pytest.raises(OptionError, match="neither a cache's directory nor a bundle"):
        preflight(path, here())
