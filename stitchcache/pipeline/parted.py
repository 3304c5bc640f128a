"""Where a captured graph parts from its model; and ``verify``, for callables of any kind. Cold roads only."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch.fx import Interpreter, Node

from stitchcache.capture import BoundTensor, Capture
from stitchcache.errors import ModelMismatchError
from stitchcache.graph.effects import written_placeholders
from stitchcache.pieces.check import undefined_outputs
from stitchcache.pipeline.compare import Compared, disagreement, judged, measure, run_both
from stitchcache.state import plain_tensors
from stitchcache.torchside import tree
from stitchcache.types import Check


def written_names(captured: Capture) -> list[str]:
    """Tensors of the model that a graph writes, such as ``buffer:cache``."""
    written = written_placeholders(captured.gm)
    names = [
        f"{b.kind}:{b.name}" for b in captured.bound if b.placeholder in written and b.kind != "constant"
    ]
    names += [mutation for mutation in captured.output_spec.mutations if mutation.startswith("buffer:")]
    return list(dict.fromkeys(names))


def read_paths(bound: Sequence[BoundTensor]) -> list[str]:
    """Paths to the tensors in plain attributes that a graph reads."""
    return [path for b in bound if b.kind == "attribute" for path in (b.name, *b.aliases)]


def undefined_results(captured: Capture, items: Sequence[Compared]) -> frozenset[str]:
    """Names of results whose values nobody promises, such as those of ``torch.empty``."""
    first = len(captured.output_spec.mutations)
    positions = {position - first for position in undefined_outputs(captured.gm)}
    results = [item.name for item in items[: captured.output_spec.count]]
    return frozenset(name for position, name in enumerate(results) if position in positions)


def check_graph(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    captured: Capture,
    writes: Mapping[str, torch.Tensor],
    effects: Mapping[str, bool],
    skipped: Collection[str],
    fails: str,
) -> None:
    """Run a captured graph op by op beside its model.

    Args:
        model: The model.
        args: Example positional arguments.
        kwargs: Example keyword arguments.
        captured: What ``torch.export`` made of it.
        writes: Tensors that it writes.
        effects: As for the look.
        skipped: Results whose values are not defined.
        fails: What the look at the compiled model found wrong with the call as a whole.

    Raises:
        ModelMismatchError: They differ.
    """
    subject, reads = _op_by_op(captured), read_paths(captured.bound)
    both = run_both(model, subject, args, kwargs, writes=writes, effects=effects, reads=reads)
    wrong = next((item for item in both.items if item.name not in skipped and disagreement(item)), None)
    if wrong is None and not both.fails:
        return
    reason = both.fails or f"{wrong.name} {disagreement(wrong)}" if wrong is not None else both.fails
    module, location = _first_place(model, args, kwargs, captured, writes)
    _refuse(type(model).__qualname__, reason, wrong, module, location)


def check_again(model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Call a model twice in a row, where its forward changes Python state and writes no tensor.

    Whatever is compiled from it repeats its first call. The caller puts back what other objects hold.

    Raises:
        ModelMismatchError: The second call gives another result.
    """

    def second(*positional: Any, **named: Any) -> Any:
        model(*positional, **named)
        return model(*positional, **named)

    both = run_both(model, second, args, kwargs)
    wrong = next((item for item in both.items if disagreement(item)), None)
    if both.drew or (wrong is None and not both.fails):
        return
    reason = both.fails or f"{wrong.name} {disagreement(wrong)}" if wrong is not None else both.fails
    raise ModelMismatchError(
        f"{type(model).__qualname__}: a second call gives another result than the first ({reason}): the "
        "forward changes numbers, lists or other objects that it also reads. A compiled model repeats the "
        "first call. Nothing was stored. Keep what changes in buffers, written in place, or pass it as an "
        "argument; or pass check='none' if the first call is what you want.",
        reason=reason,
        output=wrong.name if wrong is not None else "",
        difference=wrong.difference if wrong is not None else 0.0,
    )


def _refuse(label: str, reason: str, item: Compared | None, module: str, location: str) -> NoReturn:
    where = f" The first place where they part is {module}" if module else ""
    where += f" ({location})." if module and location else "." if module else ""
    raise ModelMismatchError(
        f"{label}: what torch.export captured is not what the model does on the example: {reason}.{where} "
        "Nothing was stored. A forward that asks whether it is being traced, or that reads state which its "
        "attributes do not show, comes out different. Change it there, or pass check='none' if the graph is "
        "what you want.",
        reason=reason,
        location=location,
        output=item.name if item is not None else "",
        difference=item.difference if item is not None else 0.0,
        module=module,
    )


def _op_by_op(captured: Capture) -> Callable[..., Any]:
    """A captured graph, called as the model is."""
    spec, mutations = tree.loads(captured.output_spec.tree), captured.output_spec.mutations
    bound = {item.name: item.tensor for item in captured.bound}

    def call(*args: Any, **kwargs: Any) -> Any:
        leaves, _ = tree.flatten((args, kwargs))
        with _no_autocast():
            results = list(Interpreter(captured.gm).run(*bound.values(), *leaves))
        for mutation, value in zip(mutations, results, strict=False):
            kind, _, where = mutation.partition(":")
            (leaves[int(where)] if kind == "input" else bound[where]).copy_(value)
        return tree.unflatten(results[len(mutations) :], spec)

    return call


@contextlib.contextmanager
def _no_autocast() -> Any:
    """A captured graph has its casts written out."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


class _Beside(Interpreter):
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


class _Call(NamedTuple):
    """Tensors of a module's first call."""

    took: list[torch.Tensor]
    gave: list[torch.Tensor]


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


def _first_place(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    captured: Capture,
    writes: Mapping[str, torch.Tensor],
) -> tuple[str, str]:
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
        run_both(model, lambda *_a, **_k: None, args, kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    beside = _Beside(captured, calls)
    leaves = tree.flatten((args, dict(kwargs)))[0]

    def run(*_args: Any, **_kwargs: Any) -> None:
        with _no_autocast():
            beside.run(*(item.tensor for item in captured.bound), *leaves)

    run_both(model, run, args, kwargs, writes=writes)
    if beside.found is None:
        return "", ""
    path, took_right, node = beside.found
    parent, _, name = path.rpartition(".")
    whole = path if took_right else parent
    kind = type(model.get_submodule(whole)).__name__
    return f"{whole or 'the forward'} ({kind}){'' if took_right else f', before its {name}'}", _line_of(node)


def _copies(values: Any) -> list[torch.Tensor]:
    return [leaf.detach().clone() for leaf in tree.flatten(values)[0] if isinstance(leaf, torch.Tensor)]


def _modules_of(node: Node) -> list[str]:
    """Paths of the modules that an op stands in, the outermost first; those of second calls are left out."""
    return [
        str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values() if "@" not in str(path)
    ]


def _line_of(node: Node) -> str:
    """``file:line`` of the innermost frame that a node remembers."""
    found = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return ":".join(found[-1]) if found else ""


def verify(
    model: torch.nn.Module,
    compiled: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
) -> Check:
    """Compare any callable with the model that it stands for, as the look does.

    For ``torch.compile(model, ...)``, whose backend sees only the graphs that Dynamo made, and for whatever
    else should do what a model does. Both run once from the same state, and what they write is put back.

    Args:
        model: The model itself.
        compiled: Called as the model is.
        args: Positional arguments.
        kwargs: Keyword arguments.

    Returns:
        ``state`` is ``"agreed"``, ``"mismatch"`` or ``"unchecked"``; ``reason`` says which result differs and
        by how much, or why nothing was compared.
    """
    began = time.perf_counter()
    given = dict(kwargs or {})
    # What it writes is not known, so whatever it may write is kept.
    writes = {f"buffer:{name}": buffer for name, buffer in model.named_buffers()}
    writes |= {f"attribute:{path}": tensor for path, tensor in plain_tensors(model).items()}
    paths = tree.leaf_paths(getattr(model, "forward", model), args, given)
    leaves = zip(paths, tree.flatten((args, given))[0], strict=True)
    writes |= {f"input:{path}": leaf for path, leaf in leaves if isinstance(leaf, torch.Tensor)}
    return judged(run_both(model, compiled, args, given, writes=writes), None, began)
