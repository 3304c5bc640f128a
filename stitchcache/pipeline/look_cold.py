"""The look at a fresh compilation, and where a captured graph parts from its model. Cold roads only."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.fx import Interpreter, Node

from stitchcache.capture import Capture
from stitchcache.capture.regions import no_autocast
from stitchcache.compare import HIGH, Both, Compared, disagreement, measure, run_both
from stitchcache.errors import ModelMismatchError, PieceMismatchError
from stitchcache.graph.effects import written_placeholders
from stitchcache.pieces.check import undefined_outputs
from stitchcache.pipeline.look import record_of, written_by
from stitchcache.torchside import tree
from stitchcache.types import Check, CheckRecord, OutputBound

if TYPE_CHECKING:
    from stitchcache.pipeline.find import Wanted
    from stitchcache.runtime.model import CompiledModel

# What is still taken for rounding at a cold compile, where the captured graph was run op by op and agreed
# with the model, and each piece agreed with its graph: the root of the mean square, relative.
_CEILING = {torch.float64: 1e-6, torch.complex128: 1e-6, torch.float32: 1e-2, torch.complex64: 1e-2}
# Share of whole numbers (argmax, a comparison) that rounding may turn over in the same case.
_TURNED = 0.05

_Beside = Callable[..., Both]


def look_cold(
    wanted: Wanted, captured: Capture, compiled: CompiledModel, skip: str = ""
) -> tuple[Check, CheckRecord]:
    """Compare what was compiled now with the model itself; what is seen becomes the measure for later starts.

    Args:
        wanted: The model and its example.
        captured: The graph that was compiled.
        compiled: Not stored yet.
        skip: Why nothing is to be compared; ``""`` compares.

    Raises:
        ModelMismatchError: The captured graph does something else than the model.
        PieceMismatchError: The graph is right, and the compiled pieces together are not.
    """
    names = _written_names(captured)

    def unchecked(reason: str) -> tuple[Check, CheckRecord]:
        marks = tuple(OutputBound(name=name, difference=0.0, magnitude=0.0) for name in names)
        record = CheckRecord(state="unchecked", reason=reason, bounds=marks)
        return Check(state="unchecked", reason=reason), record

    if skip:
        return unchecked(skip)
    writes = written_by(wanted, compiled.artifact, names)
    attributes = [item for item in captured.bound if item.kind == "attribute"]
    reads = [path for item in attributes for path in (item.name, *item.aliases)]

    def beside(subject: Callable[..., Any], times: int = 1) -> Both:
        model, effects = wanted.model, wanted.request.effects
        # Cold starts have the time to put plain objects back, too.
        return run_both(
            *(model, subject, wanted.args, wanted.kwargs),
            writes=writes,
            effects=effects,
            reads=reads,
            deep=True,
            times=times,
        )

    both = beside(compiled)
    if both.unchecked:
        return unchecked(both.unchecked)
    skipped = frozenset() if both.drew else _undefined_results(captured, both.items)
    items = [item for item in both.items if item.name not in skipped]
    wrong = _first_wrong(items)
    if both.fails or wrong is not None:
        of_graph = beside(op_by_op(captured))
        first = _first_wrong(item for item in of_graph.items if item.name not in skipped)
        if of_graph.fails or first is not None:
            raise _not_the_model(wanted, captured, of_graph.fails, first, beside)
        if wrong is not None and both.drew and not wrong.fact:
            return unchecked(f"the model draws random numbers, and {wrong.name} {disagreement(wrong)}")
        _refuse_too_far(items, both.fails)
    # A second call may index beyond a full cache, which on a GPU ends all that the process does there.
    if both.moved and (wanted.site.device == "cpu" or all(i.name.startswith("output") for i in both.items)):
        _look_twice(wanted, captured, skipped, beside)
    return Check(state="agreed"), record_of(items)


def _written_names(captured: Capture) -> list[str]:
    """Tensors of the model that a graph writes, such as ``buffer:cache``."""
    written = written_placeholders(captured.gm)
    bound = [item for item in captured.bound if item.placeholder in written and item.kind != "constant"]
    return list(dict.fromkeys(f"{item.kind}:{item.name}" for item in bound))


def _undefined_results(captured: Capture, items: Sequence[Compared]) -> frozenset[str]:
    """Names of results whose values nobody promises, such as those of ``torch.empty``."""
    positions = undefined_outputs(captured.gm)
    results = items[: captured.output_spec.count]
    return frozenset(item.name for position, item in enumerate(results) if position in positions)


def _first_wrong(items: Iterable[Compared]) -> Compared | None:
    return next((item for item in items if disagreement(item)), None)


def _refuse_too_far(items: Sequence[Compared], fails: str) -> None:
    """The graph is the model, and pieces agreed with it one by one; rounding may still add up too far."""
    for item in items:
        most = _TURNED if item.dtype is None else _CEILING.get(item.dtype, HIGH)
        if item.fact or not item.spread <= most:
            fails = fails or f"{item.name} {disagreement(item)}"
    if fails:
        raise PieceMismatchError(
            f"the compiled model disagrees with the model, and the graph between them does not: {fails}. "
            "Nothing was stored. Use backend='eager', or split at an op that keeps the pieces smaller.",
            backend="",
            piece="",
        )


def _look_twice(wanted: Wanted, captured: Capture, skipped: frozenset[str], beside: _Beside) -> None:
    """Call model and graph twice in a row: what a forward counts in Python objects, a graph has as constants.

    The graph itself, and not what was compiled from it: op by op nothing is rounded.
    """
    both = beside(op_by_op(captured), times=2)
    wrong = _first_wrong(item for item in both.items if item.name not in skipped)
    if both.fails or wrong is not None:
        raise _mismatch(
            f"{type(wanted.model).__qualname__}: a second call gives another result than the first (",
            "): the forward changes numbers, lists or other objects that it also reads. A compiled model "
            "repeats the first call. Nothing was stored. Keep what changes in buffers, written in place, or "
            "pass it as an argument; or pass check='none' if the first call is what you want.",
            both.fails,
            wrong,
        )


def _not_the_model(
    wanted: Wanted, captured: Capture, fails: str, wrong: Compared | None, beside: _Beside
) -> ModelMismatchError:
    module, location = _first_place(wanted.model, captured, beside)
    where = f" The first place where they part is {module}" if module else ""
    where += f" ({location})." if module and location else "." if module else ""
    return _mismatch(
        f"{type(wanted.model).__qualname__}: what torch.export captured is not what the model does on the "
        "example: ",
        f".{where} Nothing was stored. A forward that asks whether it is being traced, or that reads state "
        "which its attributes do not show, comes out different. Change it there, or pass check='none' if the "
        "graph is what you want.",
        fails,
        wrong,
        module=module,
        location=location,
    )


def _mismatch(head: str, tail: str, fails: str, wrong: Compared | None, **place: str) -> ModelMismatchError:
    reason = fails or (f"{wrong.name} {disagreement(wrong)}" if wrong is not None else "")
    return ModelMismatchError(
        f"{head}{reason}{tail}",
        reason=reason,
        output=wrong.name if wrong is not None else "",
        difference=wrong.difference if wrong is not None else 0.0,
        **place,
    )


def op_by_op(captured: Capture) -> Callable[..., Any]:
    """A captured graph, called as the model is."""
    spec, bound = tree.loads(captured.output_spec.tree), [item.tensor for item in captured.bound]

    def call(*args: Any, **kwargs: Any) -> Any:
        leaves, _ = tree.flatten((args, kwargs))
        with no_autocast():
            return tree.unflatten(list(Interpreter(captured.gm).run(*bound, *leaves)), spec)

    return call


class _Call(NamedTuple):
    """Tensors of a module's first call."""

    took: list[torch.Tensor]
    gave: list[torch.Tensor]


class _Along(Interpreter):
    """Runs a graph, and compares what enters and leaves each module with what the module took and gave.

    Attributes:
        found: The first module that differs, whether it took the right values, and the op to look at.
    """

    def __init__(self, captured: Capture, calls: Mapping[str, _Call]) -> None:
        super().__init__(captured.gm)
        self._calls = calls
        self._entered: dict[str, dict[Node, Any]] = {}
        self._left: dict[str, dict[Node, Any]] = {}
        self._closing: dict[Node, list[str]] = {}
        self.found: tuple[str, bool, Node] | None = None
        last: dict[str, Node] = {}
        for node in captured.gm.graph.nodes:
            last.update(dict.fromkeys(_modules_of(node), node))
        for path, node in last.items():
            self._closing.setdefault(node, []).append(path)

    def run_node(self, n: Node) -> Any:
        """Run an op; when it is the last of a module, look at what the module gave."""
        before = dict(self.env) if self.found is None else {}
        value = super().run_node(n)
        if self.found is not None:
            return value
        for path in _modules_of(n):
            entered = {node: before[node] for node in n.all_input_nodes if path not in _modules_of(node)}
            self._entered.setdefault(path, {}).update(entered)
            if any(path not in _modules_of(user) for user in n.users):
                self._left.setdefault(path, {})[n] = value
        # The innermost module first: it is the more exact place.
        for path in reversed(self._closing.get(n, ())):
            call = self._calls.get(path)
            if self.found is None and call is not None and _unlike(call.gave, self._left.get(path, {})):
                wrong = _unlike(call.took, self._entered.get(path, {}))
                self.found = (path, wrong is None, wrong or n)
        return value


def _unlike(wanted: Sequence[torch.Tensor], values: Mapping[Node, Any]) -> Node | None:
    """The op that gave another value in place of one that is wanted; ``None`` where all are there."""
    for want in wanted:
        alike = [
            (node, disagreement(measure("", want, got)))
            for node, got in values.items()
            if isinstance(got, torch.Tensor) and got.shape == want.shape and got.dtype == want.dtype
        ]
        if alike and all(wrong for _, wrong in alike):
            return alike[-1][0]
    return None


def _first_place(model: torch.nn.Module, captured: Capture, beside: _Beside) -> tuple[str, str]:
    """Where graph and model part, and ``file:line``; both empty where no module's result differs."""
    calls: dict[str, _Call] = {}

    def note(path: str) -> Callable[[Any, Any, Any, Any], None]:
        def hook(_module: Any, args: Any, kwargs: Any, result: Any) -> None:
            # Of a module that is called twice the first call counts: the graph knows it by this path.
            if path not in calls:
                calls[path] = _Call(_copies((args, kwargs)), _copies(result))

        return hook

    modules = [(path, module) for path, module in model.named_modules() if path]
    hooks = [module.register_forward_hook(note(path), with_kwargs=True) for path, module in modules]
    try:
        beside(lambda *_args, **_kwargs: None)
    finally:
        for hook in hooks:
            hook.remove()
    along = _Along(captured, calls)

    def run(*args: Any, **kwargs: Any) -> None:
        with no_autocast():
            along.run(*(item.tensor for item in captured.bound), *tree.flatten((args, kwargs))[0])

    beside(run)
    if along.found is None:
        return "", ""
    path, took_right, node = along.found
    whole, _, name = (path, "", "") if took_right else path.rpartition(".")
    kind = type(model.get_submodule(whole)).__name__
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    before = "" if took_right else f", before its {name}"
    return f"{whole or 'the forward'} ({kind}){before}", ":".join(lines[-1]) if lines else ""


def _copies(values: Any) -> list[torch.Tensor]:
    return [leaf.detach().clone() for leaf in tree.flatten(values)[0] if isinstance(leaf, torch.Tensor)]


def _modules_of(node: Node) -> list[str]:
    """Paths of the modules that an op stands in, the outermost first; those of second calls are left out."""
    return [
        str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values() if "@" not in str(path)
    ]
