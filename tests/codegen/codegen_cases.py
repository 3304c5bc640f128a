"""What the tests of generated code share: running code beside the interpreter, and comparing."""

from __future__ import annotations

import collections
import math
import operator
import pickle
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import fx

from stitchcache.artifact.consts import dump_consts, load_consts
from stitchcache.artifact.entry import decode, encode
from stitchcache.artifact.unpickle import register_const_type
from stitchcache.codegen import compile_execution_fn
from stitchcache.codegen.generate import generate_execution_code
from stitchcache.errors import UnserializableConstError
from stitchcache.types import Artifact, Variant

Point = register_const_type(collections.namedtuple("Point", "x y"))


class Opaque(torch.nn.Module):
    """A submodule that is called, not inlined."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def record(*args: Any, **kwargs: Any) -> Any:
    """A user's function: shows what it was called with."""
    return ("record", args, dict(kwargs))


class Methods:
    """A user's class, for methods as targets."""

    @staticmethod
    def static(*args: Any) -> Any:
        return ("static", args)

    @classmethod
    def made(cls, *args: Any) -> Any:
        return (cls.__name__, args)


def graph_module(build: Callable[[fx.Graph], None], root: torch.nn.Module | None = None) -> fx.GraphModule:
    """A module whose graph ``build`` writes; not recompiled, so that its own printer need not cope."""
    graph = fx.Graph()
    build(graph)
    root = root if root is not None else torch.nn.Module()
    module = fx.GraphModule(root, fx.Graph())
    for name, value in [*vars(root).items(), *root._modules.items(), *root._parameters.items()]:
        if not name.startswith("_") and name != "training":
            setattr(module, name, value)
    for name, value in root._buffers.items():
        module.register_buffer(name, value)
    module._graph = graph
    graph.owning_module = module
    return module


def slots_of(gm: torch.nn.Module, names: Sequence[str], boxed: Collection[str] = ()) -> dict[str, Any]:
    """A callable or tensor for each name."""

    def find(name: str) -> Any:
        found: Any = operator.attrgetter(name)(gm)
        if name in boxed:
            return lambda values: found(*values)
        return found

    return {name: find(name) for name in names}


def compiled(gm: fx.GraphModule, *, boxed: Collection[str] = ()) -> Callable[..., Any]:
    """The graph's function, its constants having been stored and read in between."""
    code, names, consts = generate_execution_code(gm, boxed=boxed)
    assert (code, names) == generate_execution_code(gm, boxed=boxed)[:2]
    code, stored_names, stored = _stored(code, names, consts)
    return compile_execution_fn(code, slots_of(gm, names, boxed), stored_names, stored)


def _stored(code: str, names: list[str], consts: list[Any]) -> tuple[str, Sequence[str], list[Any]]:
    """What comes back from an entry file."""
    try:
        table = dump_consts(consts)
    except UnserializableConstError:
        # Entries take fewer types than pickle does; the engine API has callers with stores of their own.
        return code, names, pickle.loads(pickle.dumps(consts))
    variant = Variant(size_range=None, code=code, submod_names=tuple(names), consts=table, pieces=())
    entry = decode(encode(Artifact(graph_hash="0" * 64, variants=(variant,))))
    return entry.code, entry.submod_names, load_consts(entry.consts)


class Nested(fx.Interpreter):
    """Interprets inner graphs too, so that no graph need have a printed form."""

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        if isinstance(module, fx.GraphModule) and not kwargs:
            return Nested(module).run(*args)
        return super().call_module(target, args, kwargs)


def check(
    gm: fx.GraphModule, *inputs: Any, boxed: Collection[str] = (), before: Callable[[], object] = lambda: None
) -> Any:
    """Run code and interpreter on copies of the inputs, and compare everything.

    ``before`` runs before both. If the interpreter fails, so must the code, and alike.
    """
    before()
    expected_inputs = _copies(inputs)
    expected, failure = _outcome(lambda: Nested(gm).run(*expected_inputs))
    expected = _copies(expected)
    before()
    own, run = _copies(inputs), compiled(gm, boxed=boxed)
    result, own_failure = _outcome(lambda: run(*own))
    assert own_failure is failure, f"{own_failure} where the interpreter had {failure}"
    assert_same(result, expected)
    assert_same(own, expected_inputs)
    return result


def _outcome(run: Callable[[], Any]) -> tuple[Any, type[Exception] | None]:
    try:
        return run(), None
    except Exception as error:  # noqa: BLE001  (whatever fails must fail alike)
        return None, type(error)


def _copies(values: Any) -> Any:
    return fx.node.map_aggregate(values, _copy)


def _copy(value: Any) -> Any:
    if isinstance(value, torch.nn.Parameter):
        return torch.nn.Parameter(value.clone(), requires_grad=value.requires_grad)
    return value.clone() if isinstance(value, torch.Tensor) else value


def assert_same(actual: Any, expected: Any, where: str = "result") -> None:
    """Equal in type and value; nan equals nan, 0.0 is not -0.0."""
    if isinstance(expected, torch.Tensor):
        assert type(actual) is type(expected), where
        assert actual.dtype == expected.dtype, where
        torch.testing.assert_close(actual, expected, equal_nan=True, rtol=0, atol=0)
    elif isinstance(expected, float):
        assert type(actual) is type(expected), where
        same_sign = math.copysign(1, actual) == math.copysign(1, expected)
        assert (actual == expected and same_sign) or (actual != actual and expected != expected), where
    elif isinstance(expected, complex):
        assert_same(actual.real, expected.real, f"{where}.real")
        assert_same(actual.imag, expected.imag, f"{where}.imag")
    elif isinstance(expected, dict):
        assert isinstance(actual, dict), where
        assert len(actual) == len(expected), where
        for (key, value), (other_key, other) in zip(actual.items(), expected.items(), strict=True):
            assert_same(key, other_key, f"{where}.keys()")
            assert_same(value, other, f"{where}[{other_key!r}]")
    elif isinstance(expected, slice):
        assert_same(
            (actual.start, actual.stop, actual.step), (expected.start, expected.stop, expected.step), where
        )
    elif isinstance(expected, (list, tuple)):
        kind = list if isinstance(expected, list) else type(expected)
        assert isinstance(actual, kind), f"{where}: {type(actual)} for {type(expected)}"
        assert len(actual) == len(expected), where
        for number, (item, other) in enumerate(zip(actual, expected, strict=True)):
            assert_same(item, other, f"{where}[{number}]")
    else:
        assert type(actual) is type(expected), f"{where}: {type(actual)} for {type(expected)}"
        assert actual == expected, where
