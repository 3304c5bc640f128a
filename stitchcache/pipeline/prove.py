"""Sizes below what torch assumed: allow them only where the graph is right at them.

``torch.export`` traces with sizes of at least 2 and decides what is different at 1: what ``squeeze`` removes,
what broadcasts, which branch a comparison takes. The user may allow 1 all the same (``Dim(min=1)``). So graph
and model are both run there, on the example's arguments cut down, before a call may bring such a size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import CodeType
from typing import Any

import sympy
import torch
from torch.fx import Interpreter, Node

from stitchcache.capture import BoundTensor, Capture, capture
from stitchcache.capture.contract import more_constraints
from stitchcache.capture.ranges import Variants, refuse
from stitchcache.capture.regions import no_autocast
from stitchcache.compare import disagreement, measure
from stitchcache.errors import CaptureError
from stitchcache.graph import symbols
from stitchcache.graph.effects import written_placeholders
from stitchcache.pieces import FAILURES
from stitchcache.pieces.check import clone_all, stand_in
from stitchcache.pipeline.find import Wanted
from stitchcache.pipeline.look_cold import beside, op_by_op
from stitchcache.state import drawn_back
from stitchcache.torchside import tree
from stitchcache.torchside.ops import guarded_facts
from stitchcache.torchside.state import has_fakes
from stitchcache.types import SizeRange

log = logging.getLogger("stitchcache")


def prove_ranges(
    wanted: Wanted, whole: Capture, variants: Variants, codes: Iterable[CodeType]
) -> tuple[Capture, Variants]:
    """Captures that let only sizes through at which every graph was shown right.

    Their contract also has what ``codes``, which ran while they were captured, ask of the arguments. A range
    that begins below what its own graph can be shown right at is an ``OptionError``.
    """
    model, effects = wanted.model, wanted.request.effects
    asked = more_constraints(codes, wanted.leaves)
    contract = replace(whole.input_spec, constraints=(*whole.input_spec.constraints, *asked))
    alone = len(variants) == 1 and variants[0][1] is whole
    whole = replace(whole, input_spec=contract)
    found: list[tuple[SizeRange | None, Capture]] = []
    for size_range, variant in variants:
        done = proved(model, whole if alone else variant, effects)
        for before, after in zip(variant.input_spec.symbols, done.input_spec.symbols, strict=True):
            if after.min > before.min and not alone:
                raise refuse(
                    f"what was captured for {size_range} could not be shown right at size {before.min}; "
                    f"begin at {after.min}, or give that size a range of its own."
                )
        found.append((size_range, done))
    return found[0][1] if alone else whole, found


def proved(model: torch.nn.Module, captured: Capture, effects: Mapping[str, bool]) -> Capture:
    """A capture that allows a size below torch's own only where its graph was shown right."""
    shape_env = symbols.shape_environment(captured.gm.graph)
    if shape_env is None:
        return captured
    contract, own = captured.input_spec, {name: symbol for symbol, name in captured.names.items()}
    assumed = {spec.name: symbols.bounds(shape_env, own[spec.name])[0] or 0 for spec in contract.symbols}
    wanted = {spec.name: spec.min for spec in contract.symbols if spec.min < assumed[spec.name]}

    def agrees(names: Iterable[str]) -> bool:
        """Whether graph and model return, and leave behind, the same at the sizes that are wanted."""
        leaves = _narrowed(captured, {own[name]: wanted[name] for name in names})
        if leaves is None:
            return False
        args, kwargs = tree.unflatten(leaves, tree.loads(contract.tree))
        if has_fakes([*captured.example, *(item.tensor for item in captured.bound)]):
            return _agrees_without_data(model, captured, args, kwargs)
        both = beside(model, args, kwargs, captured, effects).run(op_by_op(captured))
        return not both.unchecked and not both.fails and not any(map(disagreement, both.items))

    refused = {name for name in wanted if not agrees([name])}
    rest = wanted.keys() - refused
    if len(rest) > 1 and not agrees(rest):
        refused = set(wanted)
    for name in sorted(refused):
        log.info(
            "%s: size %s of %s is served from %d, not below: what was captured could not be shown "
            "right at smaller sizes",
            type(model).__qualname__,
            name,
            next((leaf.path for leaf in contract.leaves if leaf.tensor and name in leaf.tensor.shape), "?"),
            assumed[name],
        )
    bounds = [replace(s, min=assumed[s.name]) if s.name in refused else s for s in contract.symbols]
    return replace(captured, input_spec=replace(contract, symbols=tuple(bounds)))


def _agrees_without_data(model: torch.nn.Module, captured: Capture, args: Any, kwargs: Any) -> bool:
    """The same with made-up data, and the model's own graph at these very sizes instead of the model."""
    try:
        with torch.no_grad(), torch.inference_mode(False):
            fixed = capture(model, args, kwargs)
            want, got = (_MadeUp(one).results(fixed.example) for one in (fixed, captured))
    except (*FAILURES, CaptureError):
        return False
    same = want.keys() == got.keys()
    return same and not any(disagreement(measure(name, want[name], got[name])) for name in want)


class _MadeUp(Interpreter):
    """Runs a graph, and makes each tensor of the model up by its name, only while an op reads it.

    So a model runs in the memory of its activations.
    """

    def __init__(self, captured: Capture) -> None:
        super().__init__(captured.gm)
        self.inputs = captured.user_inputs
        self.bound: dict[str, BoundTensor] = {item.placeholder: item for item in captured.bound}
        self.written = written_placeholders(captured.gm)
        # What is written into must be there for the next reader.
        self.kept: dict[str, torch.Tensor] = {}

    def results(self, leaves: Sequence[Any]) -> dict[str, Any]:
        """What the graph returns and what it wrote, by name."""
        given = clone_all(leaves)
        with drawn_back({leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor)}), no_autocast():
            torch.manual_seed(0)
            results = self.run(*[None] * len(self.bound), *given)
        found = {f"output {index}": value for index, value in enumerate(results)}
        found |= {self.bound[placeholder].name: value for placeholder, value in self.kept.items()}
        inputs = enumerate(zip(self.inputs, given, strict=True))
        return found | {f"input {index}": leaf for index, (name, leaf) in inputs if name in self.written}

    def run_node(self, n: Node) -> Any:
        """Run an op on data."""
        made = {source: self._made(source.name) for source in n.all_input_nodes if source.name in self.bound}
        self.env.update(made)
        try:
            return super().run_node(n)
        finally:
            self.env.update(dict.fromkeys(made))

    def _made(self, placeholder: str) -> torch.Tensor:
        if placeholder in self.kept:
            return self.kept[placeholder]
        item = self.bound[placeholder]
        made = stand_in(item.tensor, item.name) if has_fakes([item.tensor]) else clone_all([item.tensor])[0]
        if placeholder in self.written:
            self.kept[placeholder] = made
        return made


def _narrowed(captured: Capture, sizes: Mapping[sympy.Symbol, int]) -> list[Any] | None:
    """The example's leaves at other sizes, with the strides of the contract; ``None`` if impossible."""
    nodes = captured.gm.graph.nodes
    known = {node.name: node.meta.get("val") for node in nodes if node.op == "placeholder"}
    fakes = [known[name] for name in captured.user_inputs]
    solved = symbols.solve(zip(fakes, captured.example, strict=True))
    values = {symbol: sympy.Integer(size) for symbol, size in {**solved, **sizes}.items()}
    narrowed = []
    for fake, leaf in zip(fakes, captured.example, strict=True):
        if isinstance(fake, torch.SymInt):
            leaf = symbols.evaluate(fake, values)
        elif isinstance(leaf, torch.Tensor) and isinstance(fake, torch.Tensor):
            leaf = _cut(leaf, fake, values)
        if leaf is None and fake is not None:
            return None
        narrowed.append(leaf)
    shape_env = symbols.shape_environment(captured.gm.graph)
    facts = guarded_facts(shape_env) if shape_env is not None else ()
    return None if any(fact.xreplace(values) == sympy.false for fact in facts) else narrowed


def _cut(leaf: torch.Tensor, fake: torch.Tensor, values: Mapping[sympy.Symbol, Any]) -> torch.Tensor | None:
    shape = [symbols.evaluate(size, values) for size in fake.shape]
    stride = [symbols.evaluate(size, values) for size in fake.stride()]
    if None in shape or None in stride or any(s > have for s, have in zip(shape, leaf.shape, strict=True)):  # type: ignore[operator]
        return None
    if has_fakes([leaf]):
        return stand_in(leaf.new_empty_strided(shape, stride), "an argument")  # type: ignore[arg-type]
    cut = leaf
    for dim, size in enumerate(shape):
        cut = cut.narrow(dim, 0, size)  # type: ignore[arg-type]
    if 0 in stride or cut.shape == leaf.shape:
        return cut
    made = torch.empty_strided(shape, stride, dtype=leaf.dtype, device=leaf.device)  # type: ignore[arg-type]
    return made.copy_(cut)
