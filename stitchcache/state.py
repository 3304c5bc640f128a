"""The tensors of a model by every road that leads to them, and what else its modules and objects hold.

A tensor in plain attributes, containers and objects, such as a static cache's, is named by its path:
``cache.layers[0].keys``, ``tables['long']``. By these names :func:`bind_tensors` finds an artifact's.
No code of the user's runs: no property and no ``__getattr__``.
"""

from __future__ import annotations

import functools
import random
import re
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import is_
from types import BuiltinFunctionType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import torch

from stitchcache import encoding
from stitchcache.errors import BindError
from stitchcache.torchside import INTERNALS, is_wrapper, negated, storage_id
from stitchcache.types import BindingSpec

# What holds no tensors of the model's own, however much can be reached through it.
_PLAIN = (str, bytes, int, float, complex, type(None), torch.Size, torch.dtype, torch.device)
_CLOSED = (type, ModuleType, FunctionType, MethodType, BuiltinFunctionType, *_PLAIN)
_REGISTERED = ("_parameters", "_buffers", "_modules")
# Compiled where a path is met, which most models have none of.
_STEP = r"\.?([^.\[\]]+)|\[(?:(-?\d{1,18})|'([^']*)')\]"
_CONTAINERS = (list, dict, set)
_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
_Slots = Callable[[type], list[tuple[str, MemberDescriptorType]]]


HOLDERS = (torch.nn.ModuleDict, torch.nn.ParameterDict)
"""Modules that hold parts to choose from."""


def modules_of(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """A model's modules in order, by each of their names, which end in a dot; the model's is empty."""
    todo: list[tuple[str, torch.nn.Module]] = [("", model)]
    while todo:
        prefix, module = todo.pop()
        yield prefix, module
        # Reversed, so that what comes first is taken first.
        for name, child in reversed(module._modules.items()):
            if child is not None:
                todo.append((f"{prefix}{name}.", child))


def devices_of(model: torch.nn.Module, leaves: Sequence[Any] = ()) -> tuple[str, tuple[str, ...]]:
    """The device that pieces are loaded for, and types of all devices of a model and its arguments, sorted.

    The first is that of the first accelerator among parameters, buffers and arguments, else the CPU.
    """
    given = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    tensors = [*state_of(model).values(), *given]
    # To make a device of each takes three times as long as to ask.
    found = dict.fromkeys(tensor.device for tensor in tensors if not tensor.is_cpu)
    cpu = {"cpu"} if not tensors or any(tensor.is_cpu for tensor in tensors) else set[str]()
    return next(map(str, found), "cpu"), tuple(sorted(cpu.union(device.type for device in found)))


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by each of its names."""
    # As named_parameters and named_buffers, whose nested generators take a millisecond for a deep model.
    state: dict[str, torch.Tensor] = {}
    for prefix, module in modules_of(model):
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    state[prefix + name] = tensor
    return state


def taken_apart(model: torch.nn.Module) -> torch.nn.Module:
    """A model of plain tensors for one with tensors made of others, as torchao's quantized weights are.

    It is the model itself where there are none. Else its modules are copied and share all that they hold, but
    for such a tensor: a module of its name has the inner ones, as in ``layer.weight.qdata``. During a call of
    the copy the tensor is whole. torch's own kinds (``DTensor``) are left as they are.
    """
    parts = {
        id(tensor): _Parts(tensor)
        for tensor in state_of(model).values()
        if type(tensor) not in _PLAIN_TENSORS
        and is_wrapper(tensor)
        and type(tensor).__module__.partition(".")[0] != "torch"
    }
    if not parts:
        return model
    copies: dict[int, torch.nn.Module] = {}
    for _, module in modules_of(model):
        if id(module) not in copies:
            copies[id(module)] = made = type(module).__new__(type(module))
            for name, value in vars(module).items():
                # torchao sets extra_repr to a method of the module that was, for people only.
                if name != "extra_repr":
                    copied = name in INTERNALS and isinstance(value, dict)
                    vars(made)[name] = value.copy() if copied else value
    whole = _Whole()
    for module in copies.values():
        for name, child in module._modules.items():
            module._modules[name] = None if child is None else copies[id(child)]
        for registry in ("_parameters", "_buffers"):
            table = vars(module)[registry]
            for name in [name for name, tensor in table.items() if id(tensor) in parts]:
                held = parts[id(table.pop(name))]
                module._modules[name] = held
                whole.places.append((held, module, registry, name))
    copy = copies[id(model)]
    copy.register_forward_pre_hook(whole.begin, prepend=True)
    copy.register_forward_hook(whole.end, always_call=True)
    return copy


class _Parts(torch.nn.Module):
    """The tensors that one tensor is made of, and what else it takes to make it."""

    def __init__(self, tensor: Any) -> None:
        super().__init__()
        self.training = False
        names, self.context = tensor.__tensor_flatten__()
        self.cls, self.size, self.strides = type(tensor), tuple(tensor.shape), tensor.stride()
        for name in names:
            part = getattr(tensor, name)
            inner = is_wrapper(part)
            table: Any = self._modules if inner else self._buffers
            table[name] = _Parts(part) if inner else part

    def whole(self) -> Any:
        nested: Any = self._modules
        parts = {**self._buffers, **{name: part.whole() for name, part in nested.items()}}
        return self.cls.__tensor_unflatten__(parts, self.context, self.size, self.strides)


class _Whole:
    """Hooks around a model's call, in which tensors that were taken apart are whole."""

    def __init__(self) -> None:
        self.places: list[tuple[_Parts, torch.nn.Module, str, str]] = []

    def begin(self, *_: Any) -> None:
        made: dict[int, Any] = {}
        for parts, module, registry, name in self.places:
            if id(parts) not in made:
                made[id(parts)] = parts.whole()
            # Found before the submodule of this name.
            vars(module)[registry][name] = made[id(parts)]

    def end(self, *_: Any) -> None:
        for _parts, module, registry, name in self.places:
            vars(module)[registry].pop(name, None)


def plain_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor that plain attributes, containers and objects but torch's own lead to, by its paths."""
    return {path: value for path, value in _reached(model) if isinstance(value, torch.Tensor)}


def _reached(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Tensors, and whatever is looked into on the way to them, by path."""
    seen = {id(module) for _, module in modules_of(model)}
    todo: list[tuple[str, Any]] = []
    slots = functools.cache(encoding.slots_of)
    for prefix, module in modules_of(model):
        # Not its tables of hooks: a deep model has thousands of them, nearly all empty.
        inside = [(prefix + name, value) for name, value in vars(module).items() if name not in INTERNALS]
        todo += reversed(inside)
        while todo:
            path, value = todo.pop()
            if isinstance(value, torch.Tensor):
                yield path, value
            elif not isinstance(value, _CLOSED) and id(value) not in seen:
                seen.add(id(value))
                yield path, value
                todo += reversed(list(_inside(path, value, slots)))


def _inside(path: str, value: Any, slots: _Slots) -> Iterator[tuple[str, Any]]:
    """What lies in a container or an object, with the path to it."""
    if isinstance(value, dict):
        for key, item in dict.items(value):
            if type(key) in (int, str):
                yield f"{path}[{_written(key)}]", item
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield f"{path}[{index}]", item
    if isinstance(value, torch.nn.Module):
        # A module that is not registered, in a list say: its tensors are no parameters of the model.
        for registry in _REGISTERED:
            for name, item in vars(value)[registry].items():
                yield f"{path}.{name}", item
    elif type(value).__module__.partition(".")[0] == "torch":
        return
    # An object's own attributes: those of its ``__dict__``, and its slots, which are found once a class.
    for name, item in encoding.state_of(value, frozenset(), slots(type(value))):
        if name.isidentifier() and name not in _REGISTERED:
            yield f"{path}.{name}", item


def _written(key: int | str) -> str:
    # torch keeps the tensors of a graph under dotted names, and writes such a name between double quotes.
    escaped = re.sub(r"[^\w -]", lambda found: f"%{ord(found[0]):x};", str(key))
    return escaped if isinstance(key, int) else f"'{escaped}'"


def tensor_at(model: torch.nn.Module, path: str) -> torch.Tensor | None:
    """The tensor at a path of :func:`plain_tensors`, or under a qualified name; ``None`` if there is none."""
    value: Any = model
    end = 0
    for step in re.finditer(_STEP, path):
        if step.start() != end:
            return None
        end = step.end()
        if step[1] is not None:
            value = _named(value, step[1])
        elif isinstance(value, dict):
            value = dict.get(value, int(step[2]) if step[2] is not None else _read(step[3]))
        else:
            at = int(step[2] or -1) if isinstance(value, (list, tuple)) else -1
            value = value[at] if 0 <= at < len(value) else None
    return value if end == len(path) and isinstance(value, torch.Tensor) else None


def state_attributes(model: torch.nn.Module, names: Iterable[str]) -> set[str]:
    """Attributes at which paths leave the module tree; names of parameters and buffers do not."""
    registered, found = state_of(model), set()
    for path in names:
        module: Any = model
        for step in re.finditer(_STEP, "" if path in registered else path):
            if step[1] is None or not isinstance(module, torch.nn.Module) or step[1] not in module._modules:
                found.add(step[1] or "")
                break
            module = module._modules[step[1]]
    return found


def _named(value: Any, name: str) -> Any:
    if isinstance(value, torch.nn.Module):
        for registry in _REGISTERED:
            if name in vars(value)[registry]:
                return vars(value)[registry][name]
    own = encoding.state_of(value, frozenset(), encoding.slots_of(type(value)))
    return next((item for known, item in own if known == name), None)


def _read(text: str) -> str:
    return re.sub(r"%([0-9a-f]{1,5});", lambda found: chr(int(found[1], 16)), text)


def elements_of(tensor: torch.Tensor) -> tuple[object, ...] | None:
    """What tells a tensor's elements from those of others; ``None`` for one without strides.

    Not identity: torch.export detaches the parameters that it meets outside of the module tree.
    """
    if tensor.layout != torch.strided:
        return None
    return (storage_id(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def bind_tensors(
    bindings: tuple[BindingSpec, ...], model: torch.nn.Module, constants: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Look up the tensors that stitching code uses, by reference.

    Raises:
        BindError: One is missing, or differs in shape, strides, dtype or device type.
    """
    state = state_of(model)
    dtypes: dict[str, object] = {}
    found: dict[str, torch.Tensor] = {}
    for binding in bindings:
        tensor = (constants if binding.kind == "constant" else state).get(binding.name)
        if tensor is None and binding.kind != "constant":
            # In a plain attribute, or one of those that a quantized parameter is made of.
            tensor = tensor_at(model, binding.name)
        if tensor is None:
            what = f"the model has no {binding.kind} {binding.name!r}, which the artifact uses"
            raise _unfit(what, binding.name, binding.kind, "nothing")
        for alias in binding.aliases:
            other = state.get(alias)
            if other is None:
                other = tensor_at(model, alias)
            # Another object over the same memory is the same to whoever reads or writes it.
            if other is not tensor and (other is None or elements_of(other) != elements_of(tensor)):
                what = f"{alias!r} and {binding.name!r} were one tensor when it was compiled: tie them again"
                raise _unfit(what, alias, f"the same tensor as {binding.name}", "another tensor")
        spec = binding.tensor
        if spec.dtype not in dtypes:
            dtypes[spec.dtype] = getattr(torch, spec.dtype, None)
        # Nearly always all is as it was; what is not, and whether it matters, is found out apart.
        if (
            tensor.shape != spec.shape
            or tensor.dtype is not dtypes[spec.dtype]
            or tensor.device.type != spec.device
            or tensor.stride() != spec.stride
        ):
            _check_bound(binding, tensor)
        found[binding.name] = tensor
    return found


def _check_bound(binding: BindingSpec, tensor: torch.Tensor) -> None:
    spec = binding.tensor
    strides = [(s, w) for n, s, w in zip(tensor.shape, tensor.stride(), spec.stride, strict=False) if n > 1]
    facts = (
        ("shape", spec.shape, tuple(tensor.shape)),
        ("dtype", spec.dtype, str(tensor.dtype).removeprefix("torch.")),
        ("device", spec.device, tensor.device.type),
        ("strides", [w for _, w in strides], [s for s, _ in strides]),
    )
    for fact, wanted, actual in facts:
        if wanted != actual:
            what = f"{binding.kind} {binding.name!r} has {fact} {actual}, the artifact needs {wanted}"
            raise _unfit(what, binding.name, f"{fact} {wanted}", str(actual))


def _unfit(what: str, name: str, expected: str, actual: str) -> BindError:
    return BindError(
        f"{what}. Load it with the model that it was compiled from, or compile this one.",
        name=name,
        expected=expected,
        actual=actual,
    )


class Held:
    """What a model's modules hold now, with containers right in their attributes; not what tensors contain.

    ``deep`` looks into all plain containers and objects too, but for slots.
    """

    def __init__(self, model: torch.nn.Module, *, deep: bool = False) -> None:
        self._before = [(space, space.copy()) for space in _spaces(model, deep)]

    def put_back(self) -> bool:
        """Make it what it was, and tell whether anything was different."""
        # Most are empty, and stay so.
        changed = [(now, then) for now, then in self._before if (now or then) and _differs(now, then)]
        for space, items in changed:
            if isinstance(space, list):
                space[:] = items
                continue
            # Not emptied without need: the user's own call may run beside a look in the background.
            if isinstance(space, set) or list(space) != list(items):
                space.clear()
            space.update(items)
        return bool(changed)


def _spaces(model: torch.nn.Module, deep: bool) -> Iterator[Any]:
    """Dictionaries, lists and sets that hold a part of a model."""
    for _, module in modules_of(model):
        own = vars(module)
        yield own
        # A registry is a dictionary too.
        plain = () if deep else _CONTAINERS
        yield from (value for name, value in own.items() if name in _REGISTERED or type(value) in plain)
    for _, value in _reached(model) if deep else ():
        # Asked of its class first: a __getattr__ must not answer for it.
        held = value if type(value) in _CONTAINERS or not type(value).__dictoffset__ else value.__dict__
        if type(held) in _CONTAINERS:
            yield held


def _differs(space: Any, items: Any) -> bool:
    if isinstance(space, set):
        return bool(space != items)
    if len(space) != len(items) or not all(map(is_, space, items)):
        return True
    return isinstance(space, dict) and not all(map(is_, space.values(), items.values()))


@contextmanager
def drawn_back(values: Iterable[Any]) -> Iterator[None]:
    """Let a block draw random numbers, and leave the generators as they were; see :func:`generators`."""
    states = list(generators(values))
    try:
        yield
    finally:
        for put, state in states:
            put(state)


def generators(values: Iterable[Any]) -> Iterator[tuple[Callable[[Any], Any], Any]]:
    """Random number generators that a forward may use without naming them: how to set each, and its state.

    Of GPUs, those that have a tensor among some values.
    """
    yield torch.set_rng_state, torch.get_rng_state()
    yield random.setstate, random.getstate()
    numpy = sys.modules.get("numpy.random")
    if numpy is not None:
        yield numpy.set_state, numpy.get_state()
    for device in {value.device for value in values if isinstance(value, torch.Tensor)}:
        if device.type == "cuda":
            yield functools.partial(torch.cuda.set_rng_state, device=device), torch.cuda.get_rng_state(device)


def unwritten(values: Iterable[Any], written: Iterable[Any]) -> set[int]:
    """Storages of the tensors among values that share none with those that are written."""
    storages, wet = (
        {storage_id(value) for value in some if isinstance(value, torch.Tensor)} for some in (values, written)
    )
    return storages - wet


def clone_all(values: Sequence[Any], keep: Container[int] = ()) -> list[Any]:
    """Copies of tensors with the same strides; what shares storage shares it in the copies too.

    Anything that is not a tensor is passed through, and tensors of the storages to ``keep``.
    """
    storages: dict[int, torch.UntypedStorage] = {}
    copies: list[Any] = []
    for value in values:
        if not isinstance(value, torch.Tensor) or (key := storage_id(value)) in keep:
            copies.append(value)
            continue
        if key not in storages:
            storages[key] = value.untyped_storage().clone()  # type: ignore[no-untyped-call]
        copy = torch.empty(0, dtype=value.dtype, device=value.device)
        copy.set_(storages[key], value.storage_offset(), value.size(), value.stride())
        # Views that conjugate or negate lazily do so by a bit of theirs, not in memory.
        copy = copy.conj() if value.is_conj() else copy
        copies.append(negated(copy) if value.is_neg() else copy)
    return copies
