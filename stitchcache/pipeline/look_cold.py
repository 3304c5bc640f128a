"""The captured graph beside its model: the look at a fresh compilation, and sizes below what torch assumed.

``torch.export`` traces with sizes of at least 2 and decides what is different at 1: what ``squeeze`` removes,
what broadcasts, which branch a comparison takes. The user may allow 1 all the same (``Dim(min=1)``). So graph
and model are both run there, on the example's arguments cut down, before a call may bring such a size.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Interpreter, Node

from stitchcache.capture import BoundTensor, Capture, capture
from stitchcache.capture.contract import more_constraints
from stitchcache.capture.ranges import Variants, refuse, resized
from stitchcache.capture.regions import no_autocast
from stitchcache.compare import HIGH, Beside, Both, Compared, disagreement, measure
from stitchcache.errors import CaptureError, ModelMismatchError, PieceMismatchError
from stitchcache.graph import symbols
from stitchcache.graph.effects import written_placeholders
from stitchcache.options import SizeRange
from stitchcache.pieces import FAILURES
from stitchcache.pieces.check import stand_in, undefined_outputs
from stitchcache.pipeline.look import LASTING, record_of
from stitchcache.state import clone_all, drawn_back
from stitchcache.torchside import has_fakes, tree
from stitchcache.types import Check, CheckRecord, OutputBound

if TYPE_CHECKING:
    from stitchcache.pipeline.find import Wanted
    from stitchcache.runtime.model import CompiledModel

log = logging.getLogger("stitchcache")

# What is still taken for rounding at a cold compile, where the captured graph was run op by op and agreed
# with the model, and each piece agreed with its graph: the root of the mean square, relative.
_CEILING = {torch.float64: 1e-6, torch.complex128: 1e-6, torch.float32: 1e-2, torch.complex64: 1e-2}
# Share of whole numbers (argmax, a comparison) that rounding may turn over in the same case.
_TURNED = 0.05

_Run = Callable[..., Both]


def look_cold(
    wanted: Wanted, captured: Capture, compiled: CompiledModel, skip: str = ""
) -> tuple[Check, CheckRecord]:
    """Compare what was compiled now with the model itself; what is seen becomes the measure for later starts.

    ``skip`` is why nothing is to be compared. A ModelMismatchError if the captured graph does something else
    than the model, a PieceMismatchError if only the compiled pieces together do.
    """

    def unchecked(reason: str) -> tuple[Check, CheckRecord]:
        # What pieces write, for whoever looks later.
        names = [name for name in _writes(captured, wanted.leaves) if name.startswith(LASTING)]
        marks = tuple(OutputBound(name=name, difference=0.0, magnitude=0.0) for name in names)
        record = CheckRecord(state="unchecked", reason=reason, bounds=marks)
        return Check(state="unchecked", reason=reason), record

    if skip:
        return unchecked(skip)
    run = beside(wanted.model, wanted.args, wanted.kwargs, captured, wanted.request.effects).run
    both = run(compiled)
    if both.unchecked:
        return unchecked(both.unchecked)
    # Values that nobody promises, such as those of torch.empty.
    undefined = set() if both.drew else undefined_outputs(captured.gm)
    results = enumerate(both.items[: captured.output_spec.count])
    skipped = {item.name for position, item in results if position in undefined}
    items = [item for item in both.items if item.name not in skipped]
    wrong = _first_wrong(items)
    if both.fails or wrong is not None:
        of_graph = run(op_by_op(captured))
        first = _first_wrong(item for item in of_graph.items if item.name not in skipped)
        if of_graph.fails or first is not None:
            raise _not_the_model(wanted, captured, of_graph, first, run)
        if wrong is not None and both.drew and not wrong.fact:
            return unchecked(f"the model draws random numbers, and {wrong.name} {disagreement(wrong)}")
        # The graph is the model, and pieces agreed with it one by one; rounding may still add up too far.
        ceilings = [_CEILING.get(item.dtype, HIGH) if item.dtype else _TURNED for item in items]
        far = [i for i, most in zip(items, ceilings, strict=True) if i.fact or not i.spread <= most]
        if both.fails or far:
            said = both.fails or f"{far[0].name} {disagreement(far[0])}"
            raise PieceMismatchError(
                f"the compiled model differs from the model ({said}), but its graph, run op by op, does not. "
                "Nothing was stored. Use backend='eager', or split at an op that keeps the pieces smaller."
            )
    # A second call may index beyond a full cache, which on a GPU ends all that the process does there.
    if both.moved and (wanted.site.device == "cpu" or all(i.name.startswith("output") for i in both.items)):
        _look_twice(wanted, captured, skipped, run)
    return Check(state="agreed"), record_of(items)


def beside(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    captured: Capture,
    effects: Mapping[str, bool],
) -> Beside:
    """A model and a call, to be compared with its graph, or with what was compiled from that."""
    attributes = [item for item in captured.bound if item.kind == "attribute"]
    reads = [path for item in attributes for path in (item.name, *item.aliases)]
    writes = _writes(captured, tree.flatten((args, dict(kwargs)))[0])
    # Cold starts have the time to put plain objects back, too.
    return Beside(model, args, kwargs, writes=writes, reads=reads, effects=effects, deep=True)


def _writes(captured: Capture, leaves: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Tensors that a graph writes, by names such as ``buffer:cache``."""
    written = written_placeholders(captured.gm)
    found = {f"{i.kind}:{i.name}": i.tensor for i in captured.bound if i.placeholder in written}
    specs = zip(captured.input_spec.leaves, leaves, strict=True)
    return found | {f"input:{spec.path}": leaf for spec, leaf in specs if spec.kind == "inout"}


def _first_wrong(items: Iterable[Compared]) -> Compared | None:
    return next((item for item in items if disagreement(item)), None)


def _look_twice(wanted: Wanted, captured: Capture, skipped: set[str], run: _Run) -> None:
    """Call model and graph twice in a row: what a forward counts in Python objects, a graph has as constants.

    The graph itself, and not what was compiled from it: op by op nothing is rounded.
    """
    both = run(op_by_op(captured), times=2)
    wrong = _first_wrong(item for item in both.items if item.name not in skipped)
    if both.fails or wrong is not None:
        tail = (
            "): the forward changes numbers, lists or other objects that it also reads. A compiled model "
            "repeats the first call. Nothing was stored. Keep what changes in buffers, written in place, or "
            "pass it as an argument; or pass check='none' if the first call is what you want."
        )
        raise _mismatch(wanted, "a second call gives another result than the first (", tail, both, wrong)


def _not_the_model(
    wanted: Wanted, captured: Capture, both: Both, wrong: Compared | None, run: _Run
) -> ModelMismatchError:
    module, location = _first_place(wanted.model, captured, run)
    at = f" ({location})" if location else ""
    where = f" The first place where they differ is {module}{at}." if module else ""
    head = "what torch.export captured is not what the model does on the example: "
    tail = (
        f".{where} Nothing was stored. A forward that asks whether it is being traced, or that reads state "
        "which its attributes do not show, comes out different. Change it there, or pass check='none' if the "
        "graph is what you want."
    )
    return _mismatch(wanted, head, tail, both, wrong, module=module, location=location)


def _mismatch(
    wanted: Wanted, head: str, tail: str, both: Both, wrong: Compared | None, **facts: Any
) -> ModelMismatchError:
    if wrong is not None:
        facts |= {"output": wrong.name, "difference": wrong.difference}
    reason = both.fails or (f"{wrong.name} {disagreement(wrong)}" if wrong is not None else "")
    said = f"{type(wanted.model).__qualname__}: {head}{reason}{tail}"
    return ModelMismatchError(said, reason=reason, **facts)


def op_by_op(captured: Capture, graph: Interpreter | None = None) -> Callable[..., Any]:
    """A captured graph, called as the model is."""
    spec, bound = tree.loads(captured.output_spec.tree), [item.tensor for item in captured.bound]
    graph = graph or Interpreter(captured.gm)

    def call(*args: Any, **kwargs: Any) -> Any:
        leaves, _ = tree.flatten((args, kwargs))
        with no_autocast():
            return tree.unflatten(list(graph.run(*bound, *leaves)), spec)

    return call


def _first_place(model: torch.nn.Module, captured: Capture, run: _Run) -> tuple[str, str]:
    """Where graph and model part, and ``file:line``; both empty where no module's result differs."""
    took: dict[str, list[torch.Tensor]] = {}
    gave: dict[str, list[torch.Tensor]] = {}

    def note(path: str) -> Callable[[Any, Any, Any, Any], None]:
        def hook(_module: Any, args: Any, kwargs: Any, result: Any) -> None:
            # Of a module that is called twice the first call counts: the graph knows it by this path.
            if path not in gave:
                took[path], gave[path] = _copies((args, kwargs)), _copies(result)

        return hook

    modules = [(path, module) for path, module in model.named_modules() if path]
    hooks = [module.register_forward_hook(note(path), with_kwargs=True) for path, module in modules]
    try:
        run(lambda *_args, **_kwargs: None)
    finally:
        for hook in hooks:
            hook.remove()
    graph = _Noting(captured.gm)
    run(op_by_op(captured, graph))
    # Paths of the modules that each op stands in, the outermost first; second calls, with an @, are left out.
    stacks = {node: (node.meta.get("nn_module_stack") or {}).values() for node in captured.gm.graph.nodes}
    within = {node: [str(p) for p, _ in stack if "@" not in str(p)] for node, stack in stacks.items()}
    ends = {path: index for index, paths in enumerate(within.values()) for path in paths}
    # In the order in which they end; the innermost of several is the more exact place.
    for path in sorted(ends, key=lambda path: (ends[path], -path.count("."))):
        inside = [node for node in within if path in within[node]]
        left = [node for node in inside if any(path not in within[user] for user in node.users)]
        if path not in gave or _unlike(gave[path], left, graph.values) is None:
            continue
        entered = [one for node in inside for one in node.all_input_nodes if path not in within[one]]
        wrong = _unlike(took[path], entered, graph.values)
        whole, _, name = (path, "", "") if wrong is None else path.rpartition(".")
        kind = type(model.get_submodule(whole)).__name__
        before = "" if wrong is None else f", before its {name}"
        trace = (wrong or inside[-1]).meta.get("stack_trace") or ""
        lines = re.findall(r'File "([^"]+)", line (\d+)', trace)
        return f"{whole or 'the forward'} ({kind}){before}", ":".join(lines[-1]) if lines else ""
    return "", ""


def _unlike(
    wanted: Sequence[torch.Tensor], nodes: Sequence[Node], values: Mapping[Node, torch.Tensor]
) -> Node | None:
    """The op that gave another value in place of one that is wanted; ``None`` where all are there."""
    there = [node for node in nodes if node in values]
    for want in wanted:
        kind = (want.shape, want.dtype)
        alike = [node for node in there if (values[node].shape, values[node].dtype) == kind]
        if alike and all(disagreement(measure("", want, values[node])) for node in alike):
            return alike[-1]
    return None


class _Noting(Interpreter):
    """Runs a graph, and keeps copies of what its ops give."""

    def __init__(self, gm: torch.fx.GraphModule) -> None:
        super().__init__(gm)
        self.values: dict[Node, torch.Tensor] = {}

    def run_node(self, n: Node) -> Any:
        """Run an op; a copy, because a later one may write into what it gives."""
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            self.values[n] = value.detach().clone() if n.op == "call_function" else value
        return value


def _copies(values: Any) -> list[torch.Tensor]:
    return [leaf.detach().clone() for leaf in tree.flatten(values)[0] if isinstance(leaf, torch.Tensor)]


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
        leaves = resized(captured, {own[name]: wanted[name] for name in names})
        if leaves is None:
            return False
        leaves = [stand_in(leaf, "an argument") if has_fakes([leaf]) else leaf for leaf in leaves]
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
    """Runs a graph in the memory of its activations: the model's tensors are made up where an op reads."""

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
        with drawn_back(leaves), no_autocast():
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
