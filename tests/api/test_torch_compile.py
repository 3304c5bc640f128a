"""``torch.compile(model, backend="stitchcache")``: graphs of Dynamo's from the cache, equal to eager."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import stitchcache
from stitchcache import errors
from stitchcache.api.dynamo import compile_graph

HERE = Path(__file__).parent
ZOO = {
    "breaks": 1e-5,
    "modes": 1e-5,
    "autocast": 3e-2,
    "writes": 1e-4,
    "wraps": 1e-4,
    "layouts": 1e-5,
    "decoder": 1e-4,
}


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def zoo_process(root, backend, names, **env):
    paths = [str(HERE), str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(HERE / "dynamo_zoo.py"), str(root), backend, *names],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def said(lines):
    """What became of each graph, with its hash."""
    found = []
    for line in lines:
        for what in ("graph hit", "compiled"):
            _, mark, rest = line.partition(f": {what} ")
            if mark:
                found.append((what, rest.split()[0]))
    return found


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    """The zoo in two processes that differ in all that must not matter."""
    root = tmp_path_factory.mktemp("torch-compile")
    first = zoo_process(root, "eager", ZOO, PYTHONHASHSEED="1")
    home = tmp_path_factory.mktemp("home")
    second = zoo_process(root, "eager", ZOO, PYTHONHASHSEED="2", HOME=str(home), HOSTNAME="elsewhere")
    return first, second


def test_the_backend_is_registered():
    (found,) = entry_points(group="torch_dynamo_backends", name="stitchcache")
    assert found.load() is compile_graph
    assert "stitchcache" in torch.compiler.list_backends()


@pytest.mark.parametrize("name", ZOO)
def test_equals_eager(twice, name):
    for run in twice:
        assert run[name]["difference"] <= ZOO[name]


@pytest.mark.parametrize("name", ZOO)
def test_a_second_process_hits_every_graph(twice, name):
    first, second = (said(run[name]["lines"]) for run in twice)
    assert {what for what, _ in first} == {"compiled"}
    assert [("graph hit", key) for _, key in first] == second


def test_several_graphs_and_sizes_have_entries_of_their_own(twice):
    keys = [key for _, key in said(twice[0]["breaks"]["lines"])]
    assert len(set(keys)) >= 3


@pytest.mark.compile
def test_compiled_pieces_from_a_second_process(compiled_root):
    first = zoo_process(compiled_root, "aoti", ["counts"])["counts"]
    second = zoo_process(compiled_root, "aoti", ["counts"])["counts"]
    assert first["difference"] <= 1e-5
    assert second["difference"] <= 1e-5
    assert [what for what, _ in said(second["lines"])] == ["graph hit"]


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return torch.relu(self.linear(x))


class Renamed(nn.Module):
    def __init__(self):
        super().__init__()
        self.projection = nn.Linear(8, 8)

    def forward(self, states):
        projected = self.projection(states)
        return projected.relu()


def keys(cache):
    return {header.graph_hash for header in cache.entries()}


def compiled(cache, model=None, **options):
    return torch.compile(
        model or Small().eval(),
        backend="stitchcache",
        options={"cache": cache, "backend": "eager", **options},
    )


def test_names_do_not_count(tmp_path):
    cache = stitchcache.Cache(tmp_path)
    with torch.no_grad():
        compiled(cache)(torch.randn(3, 8))
        torch._dynamo.reset()
        compiled(cache, Renamed().eval())(torch.randn(3, 8))
    assert len(keys(cache)) == 1


def test_pieces_are_shared_with_compile(tmp_path):
    cache, model = stitchcache.Cache(tmp_path), Small().eval()
    stitchcache.compile(model, (torch.randn(3, 8),), cache=cache, backend="eager")
    before = {ref.key for key in keys(cache) for ref in cache.get(key).pieces}
    with torch.no_grad():
        compiled(cache, model)(torch.randn(3, 8))
    assert len(keys(cache)) == 2
    assert {ref.key for key in keys(cache) for ref in cache.get(key).pieces} == before


class Scaled(nn.Module):
    """Has numbers of its own, and takes one."""

    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(8, 8), 0.35

    def forward(self, x, temperature):
        return self.linear(x) * self.scale / temperature


def test_floats_of_the_model_are_constants_and_those_of_calls_are_not(tmp_path):
    cache, model, x = stitchcache.Cache(tmp_path), Scaled().eval(), torch.randn(3, 8)
    options = {"cache": cache, "backend": "eager"}
    fast = torch.compile(model, backend="stitchcache", dynamic=True, options=options)
    with torch.no_grad():
        for temperature in (0.5, 0.7, 0.9):
            torch.testing.assert_close(fast(x, temperature), model(x, temperature))
        assert len(keys(cache)) == 1
        model.scale = 2.0
        torch.testing.assert_close(fast(x, 0.5), model(x, 0.5))
    assert len(keys(cache)) == 2


class Branch(nn.Module):
    """A constant inside a graph that is passed to a higher-order op."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda t: t + torch.tensor(self.values), lambda t: t - 1, (x,))


def test_constants_in_branches_are_not_mixed_up(tmp_path):
    cache, x = stitchcache.Cache(tmp_path), torch.ones(2)
    with torch.no_grad():
        for values in ([1.0, 2.0], [3.0, 4.0]):
            torch._dynamo.reset()
            torch.testing.assert_close(compiled(cache, Branch(values))(x), x + torch.tensor(values))


@pytest.mark.parametrize(
    ("argument", "words"),
    [(torch.empty(3, device="meta"), "meta device"), (TwoTensor(torch.ones(3), torch.ones(3)), "TwoTensor")],
)
def test_what_cannot_be_captured_runs_as_it_is(tmp_path, caplog, argument, words):
    cache = stitchcache.Cache(tmp_path)
    fast = compiled(cache, lambda x: x + 1)
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="stitchcache"):
        result = fast(argument)
    assert "runs op by op and is not cached" in caplog.text
    assert words in caplog.text
    assert keys(cache) == set()
    if argument.device.type != "meta":
        torch.testing.assert_close(result.a, torch.full((3,), 2.0))


def test_a_write_to_what_wants_gradients_keeps_them_right(tmp_path):
    x = torch.ones(3, requires_grad=True)
    y = x * 1
    compiled(stitchcache.Cache(tmp_path), lambda t: t.mul_(3))(y)
    y.sum().backward()
    assert x.grad.tolist() == [3.0] * 3


def test_load_refuses_entries_of_dynamo(tmp_path):
    cache, model = stitchcache.Cache(tmp_path), Small().eval()
    with torch.no_grad():
        compiled(cache, model)(torch.randn(3, 8))
    with pytest.raises(errors.BindError, match=r"torch\.compile captured"):
        stitchcache.load(keys(cache).pop(), model, cache=cache)


def test_weights_are_seen_by_reference(tmp_path):
    model = Small().eval()
    fast = compiled(stitchcache.Cache(tmp_path), model)
    x = torch.randn(3, 8)
    with torch.no_grad():
        fast(x)
        model.linear.weight.mul_(3)
        torch.testing.assert_close(fast(x), model(x))


def program(source, *arguments, **env):
    paths = [str(HERE), str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-c", source, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **env},
        capture_output=True,
        text=True,
        check=False,
    )


REFUSE = """
import sys, torch, test_torch_compile as t
from stitchcache import errors
options = {"on_miss": "error"} if sys.argv[2] == "option" else {}
try:
    with torch.no_grad():
        t.compiled(sys.argv[1], **options)(torch.randn(3, 8))
except torch._dynamo.exc.BackendCompilerFailed as error:
    assert isinstance(error.__cause__ or error.inner_exception, errors.CacheMissError)
    print(error)
"""


@pytest.mark.parametrize("way", ["option", "environment"])
def test_a_miss_can_be_an_error(tmp_path, way):
    # In a process of its own: a backend that raises leaves Dynamo looking at every frame.
    env = {"STITCHCACHE_REQUIRE": "1"} if way == "environment" else {}
    done = program(REFUSE, tmp_path, way, **env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "a miss is an error here" in done.stdout


def test_it_warns_that_there_are_no_gradients(tmp_path, caplog):
    fast = compiled(stitchcache.Cache(tmp_path))
    with caplog.at_level(logging.WARNING, logger="stitchcache"):
        result = fast(torch.randn(3, 8))
    assert "no gradients" in caplog.text
    assert not result.requires_grad


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"mode": "reduce-overhead"}, "has no modes"),
        ({"options": {"backend": "nonsense"}}, "there is aoti"),
        ({"options": {"splitting_ops": "aten::mm"}}, "a list of names"),
        ({"options": {"cache": 5}}, "a directory or a stitchcache.Cache"),
        ({"options": {"key_factors": 3}}, "give a dict"),
        ({"options": {"dynamic_shapes": {}}}, "means nothing"),
        ({"options": {"stitchcache.jobs": "two"}}, "stitchcache.jobs"),
    ],
)
def test_options_that_make_no_sense(kwargs, words):
    gm = torch.fx.symbolic_trace(Small())
    with pytest.raises(errors.OptionError, match=words):
        compile_graph(gm, [torch.randn(3, 8)], **kwargs)


def test_only_torch_compile_may_call_it():
    gm = torch.fx.symbolic_trace(Small())
    with pytest.raises(errors.BackendError, match=r"for torch\.compile to call"):
        compile_graph(gm, [torch.randn(3, 8)], options={"backend": "eager"})


def test_a_damaged_entry_is_compiled_again(tmp_path):
    cache, model, x = stitchcache.Cache(tmp_path), Small().eval(), torch.randn(3, 8)
    with torch.no_grad():
        compiled(cache, model)(x)
        (path,) = (tmp_path / "entries").rglob("*.stitch")
        data = bytearray(path.read_bytes())
        data[-40] ^= 1
        path.write_bytes(data)
        torch._dynamo.reset()
        torch.testing.assert_close(compiled(stitchcache.Cache(tmp_path), model)(x), model(x))
    assert len(keys(cache)) == 1
