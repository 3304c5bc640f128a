"""Sizes below what torch assumed: allow them only where the graph is right at them.

``torch.export`` traces with sizes of at least 2 and decides on the way what is different at 1:
whether ``squeeze`` removes a dimension, whether operands broadcast, which branch a comparison takes.
The user may allow 1 all the same (``Dim(min=1)``). So the graph and the model are both run there, on
the example's own arguments cut down, before a call may bring such a size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from stitchcache.errors import CaptureError
from stitchcache.graph import symbols
from stitchcache.graph.effects import written_placeholders
from stitchcache.pieces.check import clone_all, stand_in
from stitchcache.torchside.symbols import guarded_facts
from stitchcache.torchside.tensors import has_fakes
from stitchcache.types import InputSpec

log = logging.getLogger("stitchcache")

# What a model may raise at a size that it was never meant for.
_REFUSALS = (
    RuntimeError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    AssertionError,
    ArithmeticError,
)
_Bound = Mapping[str, tuple[str, torch.Tensor]]
_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True, slots=True)
class Subject:
    """A captured graph beside the model that it came from.

    Args:
        gm: The flat graph.
        bound: Placeholder to tensor, for what the model feeds.
        leaves: Placeholder to the example's leaf.
        call: Runs the model on leaves; returns copies of its results' leaves, and of its tensors afterwards,
            one for each of ``state``. The model's own are as before.
        mutations: How many results of the graph are write-backs.
        again: Captures the model with other leaves, all their sizes fixed: what stands for a model that
            cannot run because it has no data. Returns the graph, its bound tensors (placeholder to name
            and tensor) and its other placeholders.
        names: Placeholder to the name of the tensor that feeds it.
        state: Placeholders of the model's own tensors, all but constants.
    """

    gm: torch.fx.GraphModule
    bound: Mapping[str, torch.Tensor]
    leaves: Mapping[str, Any]
    call: Callable[[Sequence[Any]], tuple[list[Any], list[torch.Tensor]]]
    mutations: int
    again: Callable[[Sequence[Any]], tuple[torch.fx.GraphModule, _Bound, Sequence[str]]]
    names: Mapping[str, str]
    state: Sequence[str]


def prove_lower_bounds(
    contract: InputSpec, subject: Subject, names: symbols.SymbolNames, label: str
) -> InputSpec:
    """Raise the smallest size of a symbol to torch's own where the graph cannot be shown right below.

    Args:
        contract: As the user's ``dynamic_shapes`` would have it.
        subject: The graph and the model; neither is changed.
        names: Canonical names of the symbols.
        label: The model's class, for the log.

    Returns:
        The contract with bounds that hold.
    """
    shape_env = symbols.shape_environment(subject.gm.graph)
    if shape_env is None:
        return contract
    own = {name: symbol for symbol, name in names.items()}
    lowest = {
        spec.name: low
        for spec in contract.symbols
        if (low := symbols.bounds(shape_env, own[spec.name])[0] or 0) > spec.min
    }
    if not lowest:
        return contract
    wanted = {own[spec.name]: spec.min for spec in contract.symbols if spec.name in lowest}
    refused = {symbol for symbol in wanted if not _agrees(subject, {symbol: wanted[symbol]})}
    rest = {symbol: low for symbol, low in wanted.items() if symbol not in refused}
    if len(rest) > 1 and not _agrees(subject, rest):
        refused |= rest.keys()
    raised = {name for name in lowest if own[name] in refused}
    for name in sorted(raised):
        log.info(
            "%s: size %s of %s is served from %d, not below: what was captured could not be shown "
            "right at smaller sizes",
            label,
            name,
            _where(contract, name),
            lowest[name],
        )
    return replace(
        contract,
        symbols=tuple(
            replace(spec, min=lowest[spec.name]) if spec.name in raised else spec for spec in contract.symbols
        ),
    )


def _where(contract: InputSpec, name: str) -> str:
    for leaf in contract.leaves:
        if leaf.tensor is not None and name in leaf.tensor.shape:
            return f"{leaf.path}.shape[{leaf.tensor.shape.index(name)}]"
    return "the arguments"


def _agrees(subject: Subject, sizes: Mapping[sympy.Symbol, int]) -> bool:
    """Whether graph and model return, and leave behind, the same at certain sizes."""
    values = {symbol: sympy.Integer(size) for symbol, size in (_hints(subject) | dict(sizes)).items()}
    leaves = _narrowed(subject, values)
    if leaves is None:
        return False
    if has_fakes([*subject.leaves.values(), *subject.bound.values()]):
        return _agrees_without_data(subject, leaves)
    everything = [*subject.bound.values(), *leaves]
    ours, theirs = clone_all(everything), clone_all(everything)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=_cuda(everything)):
            torch.manual_seed(0)
            want, after = subject.call(theirs[len(subject.bound) :])
            torch.manual_seed(0)
            got = _run_graph(subject, ours)
    except _REFUSALS:
        return False
    changed = dict(zip(subject.state, after, strict=True))
    for index, placeholder in enumerate(subject.bound):
        theirs[index] = changed.get(placeholder, theirs[index])
    return _same(want, got) and _same(theirs, ours)


def _agrees_without_data(subject: Subject, leaves: Sequence[Any]) -> bool:
    """The same with random data, and the model's own graph at these very sizes instead of the model."""
    try:
        gm, bound, inputs = subject.again(leaves)
        with torch.no_grad(), torch.random.fork_rng(devices=_cuda(leaves)):
            torch.manual_seed(0)
            want = run_unweighted(gm, bound, dict(zip(inputs, leaves, strict=True)))
            torch.manual_seed(0)
            own = {key: (subject.names[key], tensor) for key, tensor in subject.bound.items()}
            got = run_unweighted(subject.gm, own, dict(zip(subject.leaves, leaves, strict=True)))
    except (*_REFUSALS, CaptureError):
        return False
    if not _same(want.results, got.results) or want.written.keys() != got.written.keys():
        return False
    return all(_equal(value, got.written[name]) for name, value in want.written.items())


def _run_graph(subject: Subject, values: Sequence[Any]) -> list[Any]:
    """Run the graph without autocast, as it will be run; write its mutations back."""
    given = dict(zip([*subject.bound, *subject.leaves], values, strict=True))
    ordered = [given[node.name] for node in subject.gm.graph.nodes if node.op == "placeholder"]
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        results = torch.fx.Interpreter(subject.gm).run(*ordered)
    return list(results)[subject.mutations :]


def _hints(subject: Subject) -> dict[sympy.Symbol, int]:
    """The example's own sizes."""
    nodes = subject.gm.graph.nodes
    return symbols.solve((node.meta.get("val"), subject.leaves.get(node.name)) for node in nodes)


def _narrowed(subject: Subject, values: Mapping[sympy.Symbol, Any]) -> list[Any] | None:
    """The example's leaves at other sizes, with the strides of the contract; ``None`` if impossible."""
    fakes = {node.name: node.meta.get("val") for node in subject.gm.graph.nodes if node.op == "placeholder"}
    narrowed = []
    for name, leaf in subject.leaves.items():
        value = fakes.get(name)
        if isinstance(value, torch.SymInt):
            leaf = symbols.evaluate(value, values)
        elif isinstance(leaf, torch.Tensor) and isinstance(value, torch.Tensor):
            leaf = _cut(leaf, value, values)
        if leaf is None and value is not None:
            return None
        narrowed.append(leaf)
    shape_env = symbols.shape_environment(subject.gm.graph)
    for fact in guarded_facts(shape_env) if shape_env is not None else ():
        if fact.xreplace(dict(values)) == sympy.false:
            return None
    return narrowed


def _cut(leaf: torch.Tensor, fake: torch.Tensor, values: Mapping[sympy.Symbol, Any]) -> torch.Tensor | None:
    shape = [symbols.evaluate(size, values) for size in fake.shape]
    stride = [symbols.evaluate(size, values) for size in fake.stride()]
    if None in shape or None in stride or any(s > have for s, have in zip(shape, leaf.shape, strict=True)):  # type: ignore[operator]
        return None
    if has_fakes([leaf]):
        return stand_in(leaf.new_empty_strided(shape, stride), "an argument")  # type: ignore[arg-type]
    if shape == list(leaf.shape):
        return leaf
    cut = leaf
    for dim, size in enumerate(shape):
        cut = cut.narrow(dim, 0, size)  # type: ignore[arg-type]
    if 0 in stride:
        return cut
    made = torch.empty_strided(shape, stride, dtype=leaf.dtype, device=leaf.device)  # type: ignore[arg-type]
    return made.copy_(cut)


def _same(want: Sequence[Any], got: Sequence[Any]) -> bool:
    return len(want) == len(got) and all(_equal(a, b) for a, b in zip(want, got, strict=True))


def _equal(want: Any, got: Any) -> bool:
    if not isinstance(want, torch.Tensor) or not isinstance(got, torch.Tensor):
        return type(want) is type(got) and bool(want == got or want != want)
    if want.dtype != got.dtype or want.shape != got.shape:
        return False
    if not (want.is_floating_point() or want.is_complex()):
        return torch.equal(want, got)
    tolerance = _TOLERANCE.get(want.dtype, 1e-4)
    return torch.allclose(want, got, rtol=tolerance, atol=tolerance, equal_nan=True)


def _cuda(values: Sequence[Any]) -> list[torch.device]:
    return list({v.device for v in values if isinstance(v, torch.Tensor) and v.device.type == "cuda"})


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a graph did.

    Args:
        results: All that it returned, values to write back included.
        written: Name to tensor, for what it wrote into.
    """

    results: list[Any]
    written: dict[str, Any]


def run_unweighted(gm: GraphModule, bound: _Bound, leaves: Mapping[str, Any]) -> Outcome:
    """Run a captured graph of a model that has no data, a few tensors at a time.

    Parameters and buffers get random numbers when an op needs them and are dropped after their last use, so
    that a model runs in the memory of its activations. Two graphs of one model see the same numbers, because
    a name decides them.

    Args:
        gm: A flat graph.
        bound: Placeholder to qualified name and tensor, for what the model feeds.
        leaves: Placeholder to value, for what a call brings; not changed.

    Raises:
        ValueError: A tensor cannot be made up.
    """
    runner = _Runner(gm, bound)
    given = dict(zip(leaves, clone_all(list(leaves.values())), strict=True))
    order = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        results = runner.run(*(given.get(name) for name in order))
    names = {placeholder: name for placeholder, (name, _) in bound.items()}
    written = {names.get(name, f"input {order.index(name) - len(bound)}"): name for name in runner.written}
    values = runner.kept | given
    return Outcome(list(results), {label: values.get(name) for label, name in written.items()})


class _Runner(torch.fx.Interpreter):
    """Makes a bound tensor up when a node reads it."""

    def __init__(self, gm: GraphModule, bound: Mapping[str, tuple[str, torch.Tensor]]) -> None:
        super().__init__(gm)
        self._bound = bound
        self.written = written_placeholders(gm)
        # What is written into must be there for the next reader.
        self.kept: dict[str, torch.Tensor] = {}

    def fetch_args_kwargs_from_env(self, n: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of a node, with data."""
        made = {source: self._made(source.name) for source in n.all_input_nodes if source.name in self._bound}
        held = {source: self.env[source] for source in made}
        self.env.update(made)
        try:
            fetched: tuple[tuple[Any, ...], dict[str, Any]] = super().fetch_args_kwargs_from_env(n)
        finally:
            self.env.update(held)
        return fetched

    def _made(self, placeholder: str) -> torch.Tensor:
        if placeholder in self.kept:
            return self.kept[placeholder]
        name, tensor = self._bound[placeholder]
        made = stand_in(tensor, name) if has_fakes([tensor]) else clone_all([tensor])[0]
        if placeholder in self.written:
            self.kept[placeholder] = made
        return made


def names_of(bound: Sequence[Any]) -> dict[str, tuple[str, torch.Tensor]]:
    """Bound tensors of a capture, by placeholder."""
    return {item.placeholder: (item.name, item.tensor) for item in bound}
