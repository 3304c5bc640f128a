"""From an artifact to a callable. Does no I/O.

Here are linking, which binds pieces and tensors to stitching code, and the function around that: written out,
compiled, and bound.
"""

from __future__ import annotations

import inspect
import json
import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch

from stitchcache.artifact import well_formed
from stitchcache.codegen import CodeObjects, bind_execution_fn, show_source
from stitchcache.errors import BindError, EntryFormatError, InputMismatchError, LinkError
from stitchcache.options import SizeRange
from stitchcache.runtime.contract import CALLED, CallSource, mismatch
from stitchcache.torchside import is_fake, set_grad_enabled, storage_id, tree
from stitchcache.types import BOUND, Artifact, InputSpec, OutputSpec, Variant


def link(
    artifact: Artifact,
    pieces: Mapping[str, Any],
    tensors: Mapping[str, Any],
    objects: CodeObjects,
    around: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
) -> Callable[..., Any]:
    """Make an artifact callable over the leaves that its stitching function takes; returns flat results.

    Takes a loaded piece for each piece key, and a tensor for each binding's name. Does no I/O. Each variant's
    function is put through ``around``.

    Raises:
        LinkError: A piece or a tensor is missing; ``missing`` lists the names.
        EntryFormatError: The code is not what stitchcache generates, or the entry has no contract.
    """
    inputs, _ = _contract(artifact)
    ranged = []
    for variant in artifact.variants:
        function = _link_variant(variant, pieces, tensors, objects)
        function = function if around is None else around(function)
        if variant.size_range is not None:
            ranged.append((variant.size_range, function))
        elif len(artifact.variants) == 1:
            return function
    argument, dim, name = _dispatch_on(artifact, inputs)
    return dispatch_over_ranges(ranged, argument=argument, dim=dim, name=name)


def _contract(artifact: Artifact) -> tuple[InputSpec, OutputSpec]:
    if artifact.input_spec is None or artifact.output_spec is None:
        raise EntryFormatError(
            f"entry {artifact.graph_hash[:12]} was made through the engine API and says nothing about "
            "arguments; load it with stitchcache.load_execution.",
            field="input_spec",
            reason="missing",
        )
    return artifact.input_spec, artifact.output_spec


def _link_variant(
    variant: Variant, pieces: Mapping[str, Any], tensors: Mapping[str, Any], objects: CodeObjects
) -> Callable[..., Any]:
    callables = {piece.name: pieces.get(piece.key) for piece in variant.pieces}
    for name in variant.submod_names:
        if name.startswith(f"{BOUND}."):
            callables[name] = tensors.get(name.removeprefix(f"{BOUND}."))
    missing = [name for name, found in callables.items() if found is None]
    if missing:
        raise LinkError(
            f"the stitching code needs {', '.join(missing)}, which this entry does not have. "
            "Run 'stitchcache verify --repair' and compile again.",
            missing=missing,
        )
    consts: list[Any] = []
    if variant.consts is not None:
        # Most code has none, and what reads them is one of the larger modules.
        from stitchcache.artifact.consts import load_consts

        consts = load_consts(variant.consts)
    return bind_execution_fn(variant.code, callables, variant.submod_names, consts, objects)


def _dispatch_on(artifact: Artifact, spec: InputSpec) -> tuple[int, int, str]:
    """Which argument's size chooses the variant."""
    wanted = next((v.size_range.dim for v in artifact.variants if v.size_range is not None), None)
    symbols = [symbol.name for symbol in spec.symbols if wanted in (None, symbol.label)]
    for position, leaf in enumerate(artifact.taken.values()):
        if leaf.tensor is not None and symbols and symbols[0] in leaf.tensor.shape:
            dim = leaf.tensor.shape.index(symbols[0])
            return position, dim, f"{leaf.path}.shape[{dim}]"
    raise LinkError("the artifact has variants by size, and no argument has that size.")


def build_call(
    function: Callable[..., Any] | None,
    artifact: Artifact,
    tensors: Mapping[str, torch.Tensor],
    forward: Callable[..., Any],
    objects: CodeObjects,
    fakes: Collection[type] = (),
) -> Callable[..., Any]:
    """The function behind :class:`CompiledModel`: source around a stitching function, compiled and bound.

    Without a stitching function a call is only checked. Code objects of the source are taken from
    ``objects``, and new ones are added. ``fakes`` are further types that count as tensors.

    Raises:
        EntryFormatError: The contract cannot be what a capture wrote.
    """
    inputs, outputs = _contract(artifact)
    with well_formed("input_spec or output_spec"):
        source, arguments = CallSource(inputs, artifact.narrowed), _Arguments(inputs, forward)
        leaves, apart = source.open(arguments.collected), "apart" in inputs.constraints
        source.check(leaves)
        source.lines.append("if function is None: return None")
        _check_converted(source, artifact, tensors)
        _check_results(artifact, outputs)
        _write_body(source, outputs, leaves, tensors)
        source.names.update(
            CALLED,
            fakes=fakes,
            function=function,
            refuse=None,
            take_apart=arguments.take_apart,
            state=frozenset(map(storage_id, tensors.values())) if apart else frozenset(),
            grad_enabled=torch.is_grad_enabled,
            set_grad_enabled=set_grad_enabled,
            autocast_enabled=torch.is_autocast_enabled,
            run_quietly=run_quietly,
            converted=converted,
            unflatten=tree.unflatten,
        )
        if fakes:
            # Tensors without data have no memory that could be shared.
            source.names["share_memory"] = lambda *_: False
        return _compile(source, arguments, artifact.graph_hash, objects)


def misfit(
    artifact: Artifact,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    objects: CodeObjects,
) -> str | None:
    """Why a call does not fit an artifact's contract; ``None`` where it does. Tensors may be without data."""
    fakes = {type(leaf) for leaf in tree.flatten((args, dict(kwargs)))[0] if is_fake(leaf)}
    try:
        call = build_call(None, artifact, {}, forward, objects, fakes)
        with well_formed("input_spec"):
            call(*args, **kwargs)
    except (EntryFormatError, InputMismatchError) as error:
        return str(error)
    return None


def _check_converted(source: CallSource, artifact: Artifact, tensors: Mapping[str, torch.Tensor]) -> None:
    """Notice ``model.half()`` or ``model.to(device)``, which change parameters in place, by one of them."""
    for binding in artifact.bindings:
        spec = binding.tensor
        if binding.kind == "parameter" and spec.dtype.startswith(("float", "bfloat")):
            name = source.constant(tensors.get(binding.name))
            dtype = source.constant(getattr(torch, spec.dtype, None))
            away = f" or not {name}.is_{spec.device}" if spec.device in ("cpu", "cuda") else ""
            was = f"{spec.dtype} {spec.device}"
            source.lines.append(
                f"if {name}.dtype is not {dtype}{away}: raise converted({binding.name!r}, {name}, {was!r})"
            )
            return


def converted(name: str, tensor: torch.Tensor, was: str) -> BindError:
    """The error about a model that was converted after it was compiled."""
    now = f"{str(tensor.dtype).removeprefix('torch.')} {tensor.device.type}"
    return BindError(
        f"{name} was {was} when the model was compiled, and is {now} now. Compile the model again as it is, "
        "or convert it back.",
        name=name,
        expected=was,
        actual=now,
    )


def _check_results(artifact: Artifact, outputs: OutputSpec) -> None:
    """Raise a ``ValueError`` where results, or what is written back, are not those of trees and bindings."""
    found, todo = 0, [json.loads(outputs.tree)[1]]
    while todo:
        node = todo.pop()
        found += node["type"] is None
        todo += node["children_spec"]
    if found != outputs.count:
        raise ValueError(f"{outputs.count} results for a tree of {found}")
    known = {f"buffer:{binding.name}" for binding in artifact.bindings}
    known |= {f"input:{index}" for index, leaf in enumerate(artifact.leaves) if leaf.kind == "inout"}
    for mutation in outputs.mutations:
        if mutation not in known:
            raise ValueError(f"a result is written to {mutation[:80]!r}, which is not there, or twice")
        known.discard(mutation)


def _write_body(
    source: CallSource, outputs: OutputSpec, leaves: list[str], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Call the stitching function, write mutations back, build the result."""
    specs = source.spec.leaves
    taken = [name for name, leaf in zip(leaves, specs, strict=True) if leaf.kind != "constant"]
    arguments = ", ".join(taken)
    device = source.constant(next((t.device.type for t in tensors.values()), "cpu"))
    source.lines += [
        f"if autocast_enabled({device}):",
        f"    results = run_quietly(function, {device}, ({arguments}{',' if taken else ''}))",
        "elif grad_enabled():",
        "    set_grad_enabled(False)",
        f"    try: results = function({arguments})",
        "    finally: set_grad_enabled(True)",
        f"else: results = function({arguments})",
    ]
    names = [source.fresh() for _ in range(len(outputs.mutations) + outputs.count)]
    expression = source.result(outputs, names[len(outputs.mutations) :])
    if outputs.mutations or expression is not None:
        source.lines.append(f"{', '.join(names)}, = results" if names else "results")
    for name, mutation in zip(names, outputs.mutations, strict=False):
        kind, _, where = mutation.partition(":")
        target = leaves[int(where)] if kind == "input" else source.constant(tensors.get(where))
        source.lines.append(f"{target}.detach().copy_({name})")
    if expression is None:
        # Containers that need torch's registry; looked up at the first call that needs them.
        structure = source.constant(cache(partial(tree.loads, outputs.tree)))
        expression = f"unflatten([*results[{len(outputs.mutations)}:]], {structure}())"
    source.lines.append(f"return {expression}")


def run_quietly(function: Callable[..., Any], device: str, arguments: tuple[Any, ...]) -> Any:
    """Call a function without autograd and autocast."""
    with torch.no_grad(), torch.autocast(device, enabled=False):
        return function(*arguments)


def as_it_is(model: torch.nn.Module, device: str) -> Callable[..., Any]:
    """A model's call, without autograd and autocast as compiled pieces run, whatever the caller's modes."""

    def serve(*args: Any, **kwargs: Any) -> Any:
        return run_quietly(partial(model, **kwargs), device, args)

    return serve


def _compile(
    source: CallSource, arguments: _Arguments, graph_hash: str, objects: CodeObjects
) -> Callable[..., Any]:
    body = "\n".join(f"        {line}" for line in source.lines)
    parameters = ", ".join(source.names)
    text = f"def bind({parameters}):\n    def call(*args, **kwargs):\n{body}\n    return call\n"
    filename = f"<stitchcache call {graph_hash[:12]}>"
    namespace: dict[str, Any] = {}
    code = objects.get(filename, text)
    if code is None:
        code = compile(text, filename, "exec", dont_inherit=True)
        objects.add(filename, text, code)
    exec(code, namespace)  # noqa: S102 - written above, from checked parts

    def refuse(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arranged, named = arguments.place(args, kwargs)
        arguments.take_apart(arranged, named)
        if len(arranged) == len(args) and named.keys() == kwargs.keys():
            raise mismatch("arguments", "those of the capture", "others")
        return call(*arranged, **named)

    source.names["refuse"] = refuse
    call: FunctionType = namespace["bind"](**source.names)
    show_source(call, filename, text)
    return call


class _Arguments:
    """The arguments of a call, apart from what is in them: brought into the form of the capture.

    They are named by the parameters of ``forward``, the model's own.
    """

    def __init__(self, spec: InputSpec, forward: Callable[..., Any]) -> None:
        self._tree, self._forward = spec.tree, forward
        positional, keyword = json.loads(spec.tree)[1]["children_spec"]
        self._wanted = [*positional["children_spec"], *keyword["children_spec"]]
        self._count = len(positional["children_spec"])
        self._keys: list[str] = json.loads(keyword["context"] or "[]")

    @property
    def collected(self) -> list[str]:
        """Keywords of the example that the model's ``**kwargs`` collects, in their order."""
        if len(self._keys) < 2:
            return []
        try:
            parameters = inspect.signature(self._forward).parameters.values()
        except (TypeError, ValueError):
            return self._keys
        by_name = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        return [key for key in self._keys if key not in by_name]

    def take_apart(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Flatten a call whose containers only torch knows."""
        for attempt in range(2):
            leaves, structure = tree.flatten((args, kwargs))
            if tree.dumps(structure) == self._tree:
                return leaves
            if attempt == 0:
                args, kwargs = self.place(args, kwargs)
        raise self._other_structure(args, kwargs)

    def _other_structure(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> InputMismatchError:
        """Name the first argument that is nested in another way than the example was."""
        names = [*tree.positional_names(self._forward, len(args)), *kwargs]
        for name, want, value in zip(names, self._wanted, [*args, *kwargs.values()], strict=False):
            got = json.loads(tree.dumps(tree.flatten(value)[1]))[1]
            if got == want:
                continue
            if isinstance(value, dict) and want["type"] == got["type"]:
                keys, given = json.loads(want["context"]), [*value]
                if keys != given and sorted(map(repr, keys)) == sorted(map(repr, given)):
                    return _other_order(name, keys, given)
            kind = want["type"]
            expected = "a tensor or plain value" if kind is None else f"a {kind} as in the example"
            found = type(value).__qualname__ if got["type"] != want["type"] else "other contents"
            return mismatch(name, expected, found, "Pass it nested as it was when the model was compiled.")
        given_by = f"{len(args)} positional, {sorted(kwargs)} by keyword"
        return mismatch("arguments", "those of the example", given_by)

    def place(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Move arguments between positions and keywords, and fill in defaults, as the capture had them."""
        try:
            signature = inspect.signature(self._forward)
            given = signature.bind(*args, **kwargs)
        except (TypeError, ValueError) as error:
            raise mismatch("arguments", "those of the model's forward", str(error)) from error
        ordered = self.collected
        passed = [key for key in kwargs if key in ordered]
        if len(passed) == len(ordered) and passed != ordered:
            raise _other_order("keywords", ordered, passed)
        given.apply_defaults()
        parameters = signature.parameters
        plain = [name for name, p in parameters.items() if p.kind in tree.POSITIONAL]
        first = given.args[: min(self._count, len(plain))]
        left = dict(zip(plain, given.args, strict=False)) | given.kwargs
        for name in plain[: len(first)]:
            del left[name]
        named = {key: left.pop(key) for key in self._keys if key in left}
        for name, value in left.items():
            if name not in parameters or value is not parameters[name].default:
                expected, found = "nothing: the capture's example did not pass it", type(value).__qualname__
                raise mismatch(name, expected, found, "Compile with an example that passes it.")
        return (*first, *given.args[len(plain) :]), named


def _other_order(argument: str, wanted: Sequence[Any], given: Sequence[Any]) -> InputMismatchError:
    expected, found = f"keys in the order {', '.join(map(str, wanted))}", ", ".join(map(str, given))
    return mismatch(argument, expected, found, "The model may go through them in their order.")


def dispatch_over_ranges(
    functions: Sequence[tuple[SizeRange, Callable[..., Any]]], *, argument: int, dim: int, name: str
) -> Callable[..., Any]:
    """Make one function of several, each of which serves a range of sizes.

    The size of dimension ``dim`` of a positional argument is looked at once a call; ``name`` is what the user
    calls it. A size in no range is an InputMismatchError.
    """
    table = sorted(functions, key=lambda entry: (entry[0].min, entry[0].max))
    # The first range that does not end below the size; one past the last, where no size may be.
    ends = [size_range.max for size_range, _ in table]
    starts: list[float] = [*(size_range.min for size_range, _ in table), math.inf]
    targets = [function for _, function in table]
    ranges = ", ".join(str(size_range) for size_range, _ in table)

    def dispatch(*args: Any) -> Any:
        size = args[argument].size(dim)
        place = bisect_left(ends, size)
        if size < starts[place]:
            raise mismatch(name, ranges, size, "Pad the input, or compile with a range that holds it.")
        return targets[place](*args)

    return dispatch
