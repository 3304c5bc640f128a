"""How values of torch, the standard library and numpy are written, and which attributes of them count.

Artifacts take parameters and buffers from the model by name, so metadata stands for those. Any other tensor,
and a parameter that the model also reaches by another road, becomes a constant: its value is part of the key.
"""

from __future__ import annotations

import collections
import contextvars
import ctypes
import datetime
import hashlib
import inspect
import logging
import operator
import os
import pathlib
import random
import re
import sys
import types
import typing
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from stitchcache.containers import once
from stitchcache.encoding import Handler, data_bytes
from stitchcache.torchside import FAKE_INTERNALS, HOOKS, INTERNALS
from stitchcache.types import span

if TYPE_CHECKING:
    from stitchcache.keys.walk import KeyWriter

MAX_BYTES = 64 << 20  # of a tensor or array that is read; more would take longer than a trace saves
BOUND = "tensor"  # the section in which parameters and buffers are met as such
UNFINISHED = frozenset({torch.nn.parameter.UninitializedParameter, torch.nn.parameter.UninitializedBuffer})
HF_NOTES = frozenset(
    """_is_hf_initialized name_or_path _name_or_path _commit_hash transformers_version _original_object_hash
    __validators__ __class_validators__""".split()  # noqa: SIM905
)
"""What transformers keeps for itself: where a model came from, a hash that moves with the seed, and checks
that run when a field of a configuration is set."""

HF_SETS = frozenset(
    """_no_split_modules _keep_in_fp32_modules _keep_in_fp32_modules_strict _skip_keys_device_placement
    _keys_to_ignore_on_load_unexpected _keys_to_ignore_on_load_missing _keys_to_ignore_on_save
    ignore_keys_at_rope_validation special_peft_forward_args""".split()  # noqa: SIM905
)
"""Attributes of transformers' models and configurations that hold sets of names for loading and placing
weights and for checks: no forward reads them. peft's model is only asked whether a name is in the set. Their
order would move with the hash seed, and with it the key of most models."""

_PEFT_NOTES = HF_NOTES | {"target_modules", "exclude_modules"}
"""Which modules a configuration of peft asks for, as a set: it is read when adapters are put in, and where
they are shows in the tree of modules."""

# Dynamo of torch 2.11 notes the second on parameters when it traces torch.cond.
_TENSOR_NOTES = frozenset({"_is_hf_initialized", "_dynamo_static_input_type"})
_DIFFUSERS_NOTES = frozenset({"_use_default_values", "_name_or_path", "_commit_hash", "_diffusers_version"})
"""What a configuration of diffusers says of its origin. The first is a list made from a set, in an order that
moves with the hash seed; only ``from_config`` reads it, to build another model."""

_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def is_plain_tensor(value: torch.Tensor) -> bool:
    """Whether it is torch's own kind of tensor, fake ones (a stand-in without data) not included."""
    return type(value) in _PLAIN_TENSORS


def stands_for_itself(value: torch.Tensor) -> bool:
    """Whether metadata may stand for a tensor: it is of torch's own kind, or a fake."""
    return is_plain_tensor(value) or _is_fake(value)


def _is_fake(value: torch.Tensor) -> bool:
    return any(base.__name__ == "FakeTensor" for base in type(value).__mro__)


def tensor_text(value: torch.Tensor) -> str:
    """A tensor's metadata in one line, without the index of its device."""
    layout = value.stride() if value.layout is torch.strided else value.layout
    return f"{tuple(value.shape)} {layout} {value.dtype} {value.device.type}"


def tensor_span(value: torch.Tensor) -> int:
    """Bytes from a tensor's first element to its last; 0 where it has no memory of its own to look at."""
    if not is_plain_tensor(value) or value.layout is not torch.strided or value.device.type == "meta":
        return 0
    return span(value.shape, value.stride()) * value.element_size()


def own_attributes(value: torch.Tensor) -> dict[str, Any]:
    """What somebody noted on a tensor, as far as it counts: the same on a fake as on the real one."""
    if not value.__dict__:
        return {}
    fake = _is_fake(value)
    return {
        name: noted
        for name, noted in value.__dict__.items()
        if name not in _TENSOR_NOTES and not (fake and (name in FAKE_INTERNALS or "_memo" in name))
    }


def ignored_names(cls: type) -> frozenset[str]:
    """Attributes of a class or its instances that say where they came from, not what they compute."""
    libraries = {(base.__module__ or "").partition(".")[0] for base in cls.__mro__}
    if "peft" in libraries:
        return _PEFT_NOTES
    return HF_NOTES if "transformers" in libraries else _TENSOR_NOTES


def _put_tensor(writer: KeyWriter, value: torch.Tensor) -> None:
    """Write a tensor by value; a parameter or buffer too, as it was not met as one here."""
    walk, known = writer.walk, writer.numbers.get(id(value))
    reference = writer.numbers.reference(value)
    if known is not None and (known[0] != BOUND or id(value) in walk.valued):
        writer.out += reference or b""
        return
    plain = is_plain_tensor(value) and value.layout is torch.strided and not value.is_nested
    if not plain or value.is_quantized:
        raise writer.error(f"a {type(value).__name__} tensor whose value cannot be read; make it a buffer")
    if value.numel() * value.element_size() > MAX_BYTES and value.device.type != "meta":
        what = "no buffer" if known is None else "a parameter or buffer that is also held elsewhere"
        raise writer.error(f"a tensor of {value.numel()} elements that is {what}; read it from its module")
    if known is None:
        writer.again(value)
    walk.valued.add(id(value))
    writer.head(b"tensor", 4)
    writer.out += reference or b"N"
    flags = f"{value.requires_grad} {value.is_conj()} {value.is_neg()}"
    writer.text(f"{type(value).__name__} {tensor_text(value)} {flags}")
    if value.device.type == "meta":
        writer.out += b"N"
    else:
        data = value if value.device.type == "cpu" else value.detach().cpu()
        if not is_plain_tensor(data):
            where = value.device.type
            raise writer.error(f"a tensor on {where} whose value cannot be read here; make it a buffer")
        # Read through its address, not by an operator: capture may run, and its modes would see the call.
        size = tensor_span(data)
        memory = ctypes.string_at(data.data_ptr(), size) if size else b""
        writer.out += data_bytes(hashlib.sha256(memory).digest())
        if size and known is None:
            start = value.data_ptr()
            walk.spans.append((start, start + tensor_span(value), writer.numbers.place(value)))
    if known is None:
        writer.put_state(value, _TENSOR_NOTES)
    else:
        writer.out += b"N"


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether a call of the module runs hooks."""
    return any(map(module.__dict__.get, HOOKS))


def put_hooks(writer: KeyWriter, module: torch.nn.Module) -> None:
    """Write a module's hooks in the order in which they run; their ids are the process's own."""
    state = module.__dict__
    writer.head(b"hooks", sum(len(state.get(name) or ()) for name in HOOKS))
    for name, flags in HOOKS.items():
        for index, (key, hook) in enumerate((state.get(name) or {}).items()):
            writer.head(b"hook", 2 + len(flags))
            writer.text(name)
            writer.put_at(f".{name}[{index}]", hook)
            for flag in flags:
                writer.put(key in state.get(flag, ()))


def _put_module(writer: KeyWriter, module: torch.nn.Module) -> None:
    """Write a module out of the model's own tree; its tensors become constants, so they go by value."""
    writer.head(b"nn module", 7)
    writer.put_class(type(module))
    state = module.__dict__
    writer.put(bool(module.training))
    for kind in ("_parameters", "_buffers", "_modules"):
        writer.path.append(f".{kind}")
        writer.pairs(b"part", state.get(kind, {}).items())
        writer.path.pop()
    put_hooks(writer, module)
    writer.put_state(module, INTERNALS | ignored_names(type(module)))


def by_text(kind: bytes) -> Handler:
    """How to write a value that its text says all of."""
    return by_parts(kind, lambda value: (str(value),))


def by_parts(kind: bytes, parts: Callable[[Any], tuple[Any, ...]]) -> Handler:
    """How to write a value that is known by the name of its type and a few parts."""

    def put(writer: KeyWriter, value: Any) -> None:
        writer.parts(kind, type(value).__name__, *parts(value))

    return put


def _refuse(why: str) -> Handler:
    """Write nothing: say what is the matter with values of a kind."""

    def put(writer: KeyWriter, value: Any) -> None:
        raise writer.error(f"a {type(value).__name__} {why}")

    return put


def _text_of_own(library: str) -> Handler:
    """How to write a value that its text says all of, if its class is the library's own."""

    def put(writer: KeyWriter, value: Any) -> None:
        cls = type(value)
        if vars(sys.modules[library]).get(cls.__name__) is not cls:
            raise writer.error(f"a {cls.__name__} has state that cannot be read; hold its text")
        by_text(library.encode())(writer, value)

    return put


def _parts_of_time(value: Any) -> tuple[Any, ...]:
    kind = type(value)
    if kind is datetime.timedelta:
        return value.days, value.seconds, value.microseconds
    if kind is datetime.timezone:
        return value.utcoffset(None), value.tzname(None)
    if kind is datetime.date:
        return (value.isoformat(),)
    return value.replace(tzinfo=None).isoformat(), value.fold, value.tzinfo


def _parts_of_alias(value: Any) -> tuple[Any, ...]:
    """Parts of ``list[int]``, ``Optional[int]`` and their kind."""
    bare = isinstance(value, type(typing.List))  # noqa: UP006
    of = value.__name__ if bare else getattr(value, "__origin__", None)
    return of, getattr(value, "__args__", ()), getattr(value, "__metadata__", ())


def _parts_of_type_variable(value: Any) -> tuple[Any, ...]:
    variance = bool(value.__covariant__), bool(value.__contravariant__)
    return value.__name__, value.__bound__, getattr(value, "__constraints__", ()), *variance


def _parts_of_variable(item: contextvars.ContextVar[Any]) -> tuple[Any, ...]:
    # The variable stands for its value here and now; no value is told apart from any value.
    try:
        return item.name, item.get()
    except LookupError:
        return (item.name,)


def _put_weak(writer: KeyWriter, value: weakref.ref[Any]) -> None:
    target = value()
    known = writer.numbers.reference(target)
    if target is None or known is None:
        raise writer.error("a weak reference to an object that is not a part of the model; hold it")
    writer.head(b"weak reference", 1)
    writer.out += known


_put_name = by_parts(b"special form", lambda value: (value.__name__,))
_put_type_variable = once(by_parts(b"type variable", _parts_of_type_variable))
_FIELD = type(inspect.FullArgSpec.__dict__["args"])  # what a named tuple's attributes are
_GETTERS = (_FIELD, operator.itemgetter, operator.attrgetter, operator.methodcaller)
_TIMES = (datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone)

HANDLERS: Mapping[type, Handler] = {
    **dict.fromkeys(_PLAIN_TENSORS, _put_tensor),
    torch.Size: by_parts(b"size", tuple),
    # An index is where a process happens to run, not what it computes.
    torch.device: by_parts(b"device", lambda value: (value.type,)),
    torch.dtype: by_text(b"dtype"),
    torch.layout: by_text(b"layout"),
    torch.memory_format: by_text(b"memory format"),
    contextvars.ContextVar: by_parts(b"context variable", _parts_of_variable),
    **dict.fromkeys(_GETTERS, by_parts(b"getter", lambda value: tuple(value.__reduce__()[1:]))),
    weakref.ReferenceType: _put_weak,
    typing.ForwardRef: by_parts(b"forward reference", lambda value: (value.__forward_arg__,)),
    type(typing.Optional): _put_name,
    type(typing.Literal): _put_name,
    typing.TypeVar: _put_type_variable,
    typing.ParamSpec: _put_type_variable,
    **dict.fromkeys(_TIMES, by_parts(b"time", _parts_of_time)),
}

TORCH_FAMILIES: list[tuple[type, Handler]] = [
    (torch.Tensor, _put_tensor),
    (torch.Generator, _refuse("gives other numbers each time; draw them beforehand")),
    (torch.ScriptObject, _refuse("holds state made in C++; keep it out of the model")),
    (torch.jit.ScriptFunction, _refuse("holds compiled TorchScript; hold the Python function or module")),
    (torch.jit.ScriptModule, _refuse("holds compiled TorchScript; hold the Python function or module")),
    (torch.nn.Module, once(_put_module)),
]

_put_alias = by_parts(b"alias", _parts_of_alias)
_put_nothing = by_parts(b"nothing", lambda value: ())
LIBRARY_FAMILIES: list[tuple[type, Handler]] = [
    # What loggers do changes no graph, and their state is the process's own.
    (logging.Logger, _put_nothing),
    (logging.LoggerAdapter, _put_nothing),
    # Which variables are read from it is recorded when they are.
    (type(os.environ), _put_nothing),
    (weakref.ReferenceType, _refuse("points to an object without keeping it; hold the object")),
    (random.Random, _refuse("gives other numbers each time; draw them beforehand")),
    (datetime.tzinfo, _refuse("is a time zone with rules of its own; hold its offset")),
    (re.Pattern, by_parts(b"pattern", lambda value: (value.pattern, value.flags))),
    (pathlib.PurePath, _text_of_own("pathlib")),
    (types.GenericAlias, _put_alias),
    (types.UnionType, _put_alias),
    # Nothing public is the class of these.
    (type(typing.List[int]), _put_alias),  # noqa: UP006
    (type(typing.List), _put_alias),  # noqa: UP006
]


def _put_array(writer: KeyWriter, value: Any) -> None:
    """Write a numpy array by value, with its order in memory."""
    numpy = sys.modules["numpy"]
    if value.dtype.hasobject:
        raise writer.error("a numpy array of objects; hold a list")
    if value.nbytes > MAX_BYTES:
        raise writer.error(f"a numpy array of {value.size} elements; make it a buffer")
    if writer.again(value):
        return
    plain = value.view(numpy.ndarray)
    writer.head(b"array", 7)
    memory = plain.shape, plain.strides, bool(plain.flags.writeable), plain.tobytes()
    writer.put_items((type(value), value.dtype, *memory))
    writer.put_state(value)
    if plain.size:
        low, high = numpy.lib.array_utils.byte_bounds(plain)
        writer.walk.spans.append((low, high, writer.numbers.place(value)))


def _put_number(writer: KeyWriter, value: Any) -> None:
    if value.dtype.hasobject:
        raise writer.error("a numpy scalar of objects; hold the object")
    writer.parts(b"numpy scalar", type(value), value.dtype, value.tobytes())


def _put_dtype(writer: KeyWriter, value: Any) -> None:
    try:
        described = value.descr if value.fields else None
    except ValueError as error:
        why = "a numpy data type with fields that overlap or are out of order; hold plain arrays"
        raise writer.error(why) from error
    noted = dict(value.metadata) if value.metadata else None
    writer.parts(b"numpy dtype", value.str, described, bool(value.isalignedstruct), noted)


def _put_universal(writer: KeyWriter, value: Any) -> None:
    name = value.__name__
    if getattr(sys.modules["numpy"], name, None) is not value:
        raise writer.error(f"the numpy function {name}, which is not numpy's own; hold a Python function")
    writer.parts(b"numpy function", "ufunc", name)


def _put_diffusers_config(writer: KeyWriter, value: Any) -> None:
    items = collections.OrderedDict.items(value)
    pairs = [(name, item) for name, item in items if name not in _DIFFUSERS_NOTES]
    writer.head(b"diffusers config", 2 + 2 * len(pairs))
    writer.put_class(type(value))
    writer.put_pairs(pairs)
    writer.put_state(value, _DIFFUSERS_NOTES)


_LATE: list[tuple[str, str, Handler]] = [
    ("numpy", "ndarray", _put_array),
    ("numpy", "generic", _put_number),
    ("numpy", "dtype", _put_dtype),
    ("numpy", "ufunc", _put_universal),
    ("diffusers.configuration_utils", "FrozenDict", once(_put_diffusers_config)),
    ("decimal", "Decimal", _text_of_own("decimal")),
]


def late_families() -> list[tuple[type, Handler]]:
    """Types of modules that are imported only where values of theirs exist."""
    there = ((sys.modules.get(module), name, write) for module, name, write in _LATE)
    return [(getattr(module, name), write) for module, name, write in there if module is not None]
