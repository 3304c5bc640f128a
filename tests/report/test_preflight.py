"""Foretold hits and misses are what a start on that machine would be."""

import json
import os
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

import stitchcache
from stitchcache.encoding import make_factor
from stitchcache.errors import OptionError
from stitchcache.keys import environment
from stitchcache.report.preflight import check_target, machine_record, preflight, read_machine


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) * 2


def build():
    return Scaled().eval(), (torch.zeros(2, 4),)


TARGET = stitchcache.Target("scaled", build, backend="eager")
FULL = pytest.mark.skipif(not os.environ.get("STITCHCACHE_FULL"), reason="compiles: STITCHCACHE_FULL=1")
# Made-up machines, by what is different there from here; and whether pieces of each backend hit all the same.
OTHERS = {
    "the same": {},
    "torch": {"env.torch": "2.99.0"},
    "python": {"env.python": "cpython 3.99"},
    "libc": {"env.libc": "glibc 2.1"},
    "older processor": {"env.cpu": "AVX2, 9 instruction sets"},
    "newer processor": {"env.cpu": "AVX512, 99 instruction sets"},
    "arm": {"env.platform": "linux aarch64 little", "env.cpu": "DEFAULT, 20 instruction sets"},
    "big endian": {"env.platform": "linux s390x big"},
    "numpy": {"env.numpy": "9.9"},
    "no numpy": {"env.numpy": "none"},
    "autotuned": {"env.variables": "TORCHINDUCTOR_MAX_AUTOTUNE=1"},
    "capability": {"env.variables": "ATEN_CPU_CAPABILITY=default"},
    "a library of ops": {"env.op_libraries": "1 loaded by path"},
    "another ABI": {"env.cxx_abi": "False"},
    "another schema": {"env.schema": "99"},
    "a GPU": {"env.gpu": "NVIDIA H100 80GB HBM3", "env.cuda": "cuda 13.0 hip None"},
    "another GPU": {"env.gpu": "gfx90a", "env.cuda": "cuda None hip 7.0"},
    "a factor of tomorrow": {"env.tomorrow": "1"},
    "python and libc": {"env.python": "cpython 3.99", "env.libc": "glibc 2.1"},
    "everything": {"env.torch": "2.99.0", "env.libc": "musl", "env.cpu": "x", "env.numpy": "9.9"},
}
NOT_LOOKED_AT = {"eager": {"env.libc", "env.cpu", "env.cxx_abi"}, "aoti": {"env.python"}}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    cache = stitchcache.Cache(tmp_path_factory.mktemp("preflight"))
    assert stitchcache.prewarm([TARGET], cache=cache).ok
    return cache


@pytest.fixture(scope="module")
def compiled(compiled_root):
    cache = stitchcache.Cache(compiled_root / "preflight")
    assert stitchcache.prewarm([replace(TARGET, backend="aoti")], cache=cache).ok
    return cache


@pytest.fixture
def here(tmp_path):
    def write(**changed):
        record = machine_record()
        factors = {factor["name"]: factor for factor in record["factors"]}
        factors |= {name: asdict(make_factor(name, value)) for name, value in changed.items()}
        record["factors"] = list(factors.values())
        path = tmp_path / "node.json"
        path.write_text(json.dumps(record))
        return read_machine(path)

    return write


def test_this_machine_hits(cache, here):
    (verdict,) = preflight(cache, here())
    graph_hash = verdict["graph_hash"]
    known = {"label": "scaled", "hit": True, "differences": [], "settings": []}
    assert verdict == {"graph_hash": graph_hash, **known}
    assert preflight(cache.root, here()) == [verdict]
    found = check_target(TARGET, cache, here())
    assert (found["hit"], found["graph_hash"]) == (True, graph_hash)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("backend", ["eager", pytest.param("aoti", marks=FULL)])
def test_another_machine_is_foretold_as_a_start_there_would_go(backend, name, here, monkeypatch, request):
    """What is foretold is what a lookup with that machine's factors finds."""
    cache = request.getfixturevalue("cache" if backend == "eager" else "compiled")
    there, target = here(**OTHERS[name]), replace(TARGET, backend=backend)
    (verdict,) = preflight(cache, there)
    found = check_target(target, cache, there)
    real = environment.environment_factors

    def factors_there(backend, devices):
        for factor in real(backend, devices):
            yield there[factor.name]

    monkeypatch.setattr(environment, "environment_factors", factors_there)
    model, args = build()
    cache = stitchcache.Cache(cache.root, read_only=True)
    try:
        start = stitchcache.compile(model, args, backend=backend, cache=cache, require="direct").cache_hit
    except stitchcache.errors.CacheMissError:
        start = None
    assert (start == "direct") == verdict["hit"] == found["hit"], (start, found)
    known = {factor.name for factor in real(backend, {"cpu"})}
    in_the_way = known & OTHERS[name].keys()
    assert not in_the_way & NOT_LOOKED_AT[backend]
    differences = {each["name"]: each["new"] for each in verdict["differences"]}
    assert set(differences) == in_the_way
    assert verdict["hit"] == (not in_the_way)
    for factor in in_the_way:
        assert differences[factor].startswith(OTHERS[name][factor])
    if in_the_way:
        assert {each["name"] for each in found["nearest"][0]["differences"]} == in_the_way


def test_settings_of_the_program_are_told_apart(tmp_path, here):
    cache, precision = stitchcache.Cache(tmp_path / "cache"), torch.get_float32_matmul_precision()
    there = here()
    torch.set_float32_matmul_precision("high")
    try:
        assert stitchcache.prewarm([TARGET], cache=cache).ok
    finally:
        torch.set_float32_matmul_precision(precision)
    (verdict,) = preflight(cache, there)
    assert verdict["hit"]
    assert [each["name"] for each in verdict["settings"]] == ["torch.float32_precision"]
    assert not check_target(TARGET, cache, there)["hit"], "here the program does not set it"


def test_an_entry_of_an_older_format_is_no_hit(tmp_path, cache, here):
    (key,) = [header.graph_hash for header in cache.entries()]
    other = stitchcache.Cache(tmp_path / "cache")
    artifact = cache.get(key)
    for blob in artifact.blobs:
        other.put_blob(cache.blob_path(blob))
    other.put(replace(artifact, factors=()))
    assert [verdict["hit"] for verdict in preflight(other, here())] == [False]


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
