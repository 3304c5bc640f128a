"""The tensors of a model, by every road that leads to them.

Most are parameters and buffers, under their qualified names. Others lie in plain attributes, lists, dicts and
objects, such as the layers of a static cache. Their name is a path: ``cache.layers[0].keys``,
``tables['long']``. A path is followed through what lies there, never through code of the user's: no property
and no ``__getattr__`` runs.
"""

from __future__ import annotations

import functools
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import torch

from stitchcache.torchside.modules import INTERNALS
from stitchcache.torchside.tensors import storage_id, version_of

# What holds no tensors of the model's own, however much can be reached through it.
_CLOSED = (
    type,
    ModuleType,
    FunctionType,
    MethodType,
    BuiltinFunctionType,
    torch.Size,
    torch.dtype,
    torch.device,
    str,
    bytes,
    int,
    float,
    complex,
    type(None),
)
_REGISTERED = ("_parameters", "_buffers", "_modules")
_STEP = re.compile(r"\.?([^.\[\]]+)|\[(?:(-?\d{1,18})|'([^']*)')\]")
_MISSING = object()
_Slots = dict[type, list[tuple[str, MemberDescriptorType]]]


def modules_of(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """A model's modules in their order, by each of their names, which end in a dot; the model's is empty."""
    todo: list[tuple[str, torch.nn.Module]] = [("", model)]
    while todo:
        prefix, module = todo.pop()
        yield prefix, module
        # Reversed, so that what comes first is taken first.
        for name, child in reversed(module._modules.items()):
            if child is not None:
                todo.append((f"{prefix}{name}.", child))


def devices_of(model: torch.nn.Module, leaves: Sequence[Any] = ()) -> tuple[str, tuple[str, ...]]:
    """What a model and its arguments live on.

    Returns:
        The device that pieces are loaded for (the first accelerator found among parameters, buffers and
        arguments, else the CPU), and the types of all devices, sorted.
    """
    parameters: dict[torch.device, None] = {}
    others: dict[torch.device, None] = {}
    # By hand: asking for all parameters, or a tensor whether it is one, takes milliseconds.
    todo = [model]
    while todo:
        module = todo.pop()
        for tensors, kind in ((module._parameters, parameters), (module._buffers, others)):
            for tensor in tensors.values():
                if tensor is not None:
                    kind[tensor.device] = None
        if module._modules:
            todo += [child for child in reversed(module._modules.values()) if child is not None]
    others.update((leaf.device, None) for leaf in leaves if isinstance(leaf, torch.Tensor))
    found = parameters | others
    first = next((str(device) for device in found if device.type != "cpu"), "cpu")
    return first, tuple(sorted({device.type for device in found} or {"cpu"}))


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by each of its names.

    As ``named_parameters`` and ``named_buffers`` without removal of duplicates, whose nested generators
    take a millisecond for a deep model.
    """
    state: dict[str, torch.Tensor] = {}
    for prefix, module in modules_of(model):
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    state[prefix + name] = tensor
    return state


def plain_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor that plain attributes, containers and objects lead to, by each of its paths.

    An object is looked into once, by the first path to it. Objects of torch's own classes other than modules,
    functions and classes are not looked into.
    """
    return {path: value for path, value in _reached(model) if isinstance(value, torch.Tensor)}


def _reached(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Tensors, and whatever is looked into on the way to them, by path."""
    seen = {id(module) for _, module in modules_of(model)}
    todo: list[tuple[str, Any]] = []
    slots: _Slots = {}
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
    for name, item in _attributes(value, slots):
        if name.isidentifier() and name not in _REGISTERED:
            yield f"{path}.{name}", item


def _own_space(value: Any) -> Any:
    """An object's ``__dict__``, if its class gives it one: a ``__getattr__`` must not answer for it."""
    return value.__dict__ if type(value).__dictoffset__ else None


def _attributes(value: Any, slots: _Slots) -> Iterator[tuple[str, Any]]:
    """An object's own attributes: those of its ``__dict__``, and its slots, which are found once a class."""
    own = _own_space(value)
    if isinstance(own, dict):
        yield from list(own.items())
    cls = type(value)
    if cls not in slots:
        spaces = [vars(base) for base in cls.__mro__ if "__slots__" in vars(base)]
        slots[cls] = [
            (name, member)
            for space in spaces
            for name, member in space.items()
            if isinstance(member, MemberDescriptorType)
        ]
    for name, member in slots[cls]:
        item = _slot(member, value)
        if item is not _MISSING:
            yield name, item


def _slot(member: MemberDescriptorType, value: Any) -> Any:
    try:
        return member.__get__(value, type(value))
    except AttributeError:
        return _MISSING


def _written(key: int | str) -> str:
    if isinstance(key, int):
        return str(key)
    # torch keeps the tensors of a graph under dotted names, and writes such a name between double quotes.
    return "'" + re.sub(r"[^\w -]", lambda found: f"%{ord(found[0]):x};", key) + "'"


def tensor_at(model: torch.nn.Module, path: str) -> torch.Tensor | None:
    """The tensor that a path leads to.

    Args:
        model: Where the path begins.
        path: As :func:`plain_tensors` writes it, or the name of a parameter or buffer.

    Returns:
        The tensor; ``None`` if there is none, or the path is none.
    """
    value: Any = model
    end = 0
    for step in _STEP.finditer(path):
        if step.start() != end:
            return None
        end = step.end()
        if step[1] is not None:
            value = _named(value, step[1])
        else:
            value = _item(value, int(step[2]) if step[2] is not None else _read(step[3]))
    return value if end == len(path) and isinstance(value, torch.Tensor) else None


def state_attributes(model: torch.nn.Module, names: Iterable[str]) -> set[str]:
    """Attributes at which paths leave the module tree; names of parameters and buffers do not."""
    registered, found = state_of(model), set()
    for path in names:
        module: Any = model
        for step in _STEP.finditer("" if path in registered else path):
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
    return next((item for known, item in _attributes(value, {}) if known == name), None)


def _read(text: str) -> str:
    return re.sub(r"%([0-9a-f]{1,5});", lambda found: chr(int(found[1], 16)), text)


def _item(value: Any, key: int | str) -> Any:
    if isinstance(value, dict):
        return dict.get(value, key)
    if isinstance(value, (list, tuple)) and isinstance(key, int) and 0 <= key < len(value):
        return value[key]
    return None


def memory_of(tensor: torch.Tensor) -> tuple[object, ...] | None:
    """What tells a tensor's elements from those of others; ``None`` for one without strides.

    Not identity: torch.export detaches the parameters that it meets outside of the module tree.
    """
    if tensor.layout != torch.strided:
        return None
    return (storage_id(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


@contextmanager
def kept(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Give tensors their values back after a block that may write into them."""
    copies = [(tensor, _version(tensor), tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        for tensor, version, copy in copies:
            if version is None or _version(tensor) != version:
                with torch.no_grad(), torch.inference_mode(tensor.is_inference()):
                    tensor.copy_(copy)


@contextmanager
def as_it_was(model: torch.nn.Module) -> Iterator[Callable[[], bool]]:
    """Put back what a block gives a model's modules, and its plain containers and objects, to hold.

    Their items and attributes, that is, not what tensors contain. Slots are left alone.

    Yields:
        Whether anything of this has changed until now.
    """
    before = [(space, space.copy()) for space in _spaces(model)]
    try:
        yield lambda: any(_differs(space, items) for space, items in before)
    finally:
        for space, items in before:
            if not _differs(space, items):
                continue
            if isinstance(space, list):
                space[:] = items
            else:
                space.clear()
                space.update(items)


def _differs(space: dict[Any, Any] | list[Any], items: Any) -> bool:
    if len(space) != len(items):
        return True
    if isinstance(space, list):
        return any(a is not b for a, b in zip(space, items, strict=True))
    return list(space) != list(items) or any(space[name] is not items[name] for name in items)


@contextmanager
def drawn_back(devices: Iterable[torch.device]) -> Iterator[None]:
    """Let a block draw random numbers, and leave the generators as they were."""
    states = list(generators(devices))
    try:
        yield
    finally:
        for put, state in states:
            put(state)


def generators(devices: Iterable[torch.device]) -> Iterator[tuple[Callable[[Any], Any], Any]]:
    """Random number generators that a forward may use without naming them: how to set each, and its state."""
    yield torch.set_rng_state, torch.get_rng_state()
    yield random.setstate, random.getstate()
    numpy = sys.modules.get("numpy.random")
    if numpy is not None:
        yield numpy.set_state, numpy.get_state()
    for device in devices:
        if device.type == "cuda":
            yield functools.partial(torch.cuda.set_rng_state, device=device), torch.cuda.get_rng_state(device)


def _spaces(model: torch.nn.Module) -> Iterator[dict[Any, Any] | list[Any]]:
    """Every dictionary and list that holds a part of a model, those of its modules and objects included."""
    for _, module in modules_of(model):
        own = vars(module)
        yield from (own, *(own[registry] for registry in _REGISTERED))
    for _, value in _reached(model):
        held = value if type(value) in (dict, list) else _own_space(value)
        if type(held) in (dict, list):
            yield held


@contextmanager
def unchanged(model: torch.nn.Module) -> Iterator[None]:
    """Let a model run, and put back what its forward wrote: the values of its tensors, and what it holds."""
    tensors = {id(tensor): tensor for tensor in (*state_of(model).values(), *plain_tensors(model).values())}
    with kept(list(tensors.values())), as_it_was(model):
        yield


def _version(tensor: torch.Tensor) -> int | None:
    """How often a tensor was written to; tensors made in inference mode do not count that."""
    return None if tensor.is_inference() else version_of(tensor)
