"""How torch's own values are written: dtypes, devices, tensors, modules; and which attributes of them count.

A parameter or buffer is known by its metadata, because artifacts take it from the model by name. Any other
tensor that a model holds becomes a constant of the artifact, so its value is part of the key. So does a
parameter that the model also reaches by another road, such as a plain list: export knows a parameter by the
module that it belongs to, and takes the one in the list for a constant.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from stitchcache.encoding import Handler, data_bytes, text_bytes
from stitchcache.keys.library import MAX_BYTES, refuse
from stitchcache.keys.scope import KeyWriter
from stitchcache.torchside.state import HOOKS, INTERNALS
from stitchcache.torchside.tensors import FAKE_INTERNALS
from stitchcache.types import span

OF_MODULE = b"@" + text_bytes("tensor")
"""How references to parameters and buffers begin."""

_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def is_plain_tensor(value: torch.Tensor) -> bool:
    """Whether it is torch's own kind of tensor, fake ones (a stand-in without data) not included."""
    return type(value) in _PLAIN_TENSORS


def is_fake(value: torch.Tensor) -> bool:
    """Whether a tensor is a stand-in without data, such as a model built without weights has."""
    return any(base.__name__ == "FakeTensor" for base in type(value).__mro__)


def tensor_text(value: torch.Tensor) -> str:
    """A tensor's metadata in one line, without the index of its device."""
    if value.layout is not torch.strided:
        return f"{tuple(value.shape)} {value.layout} {value.dtype} {value.device.type}"
    return f"{tuple(value.shape)} {value.stride()} {value.dtype} {value.device.type}"


def tensor_span(value: torch.Tensor) -> int:
    """Bytes from a tensor's first element to its last."""
    return span(value.shape, value.stride()) * value.element_size()


def tensor_bytes(value: torch.Tensor) -> bytes:
    """The bytes that a strided CPU tensor spans.

    Read through its address, not through an operator: capture may run, and its modes would see the call.
    """
    size = tensor_span(value)
    return ctypes.string_at(value.data_ptr(), size) if size else b""


def put_tensor(writer: KeyWriter, value: torch.Tensor) -> None:
    """Write a tensor by value; a parameter or buffer too, as it was not met as one here.

    Raises:
        UnkeyableError: Its value cannot be read: a subclass, a fake, a sparse or a huge one.
    """
    walk, known = writer.walk, writer.numbers.reference(value)
    if known is not None and (id(value) in walk.valued or not known.startswith(OF_MODULE)):
        writer.out += known
        return
    plain = is_plain_tensor(value) and value.layout is torch.strided and not value.is_nested
    if not plain or value.is_quantized:
        raise writer.error(f"a {type(value).__name__} tensor whose value cannot be read; make it a buffer")
    size = value.numel() * value.element_size()
    if size > MAX_BYTES and value.device.type != "meta":
        what = "a parameter or buffer that is also held elsewhere" if known is not None else "no buffer"
        raise writer.error(f"a tensor of {value.numel()} elements that is {what}; read it from its module")
    if known is None:
        writer.again(value)
    walk.valued.add(id(value))
    writer.head(b"tensor", 4)
    writer.out += known or b"N"
    flags = f"{value.requires_grad} {value.is_conj()} {value.is_neg()}"
    writer.text(f"{type(value).__name__} {tensor_text(value)} {flags}")
    if value.device.type == "meta":
        writer.out += b"N"
    else:
        data = value if value.device.type == "cpu" else value.detach().cpu()
        if not is_plain_tensor(data):
            raise writer.error(f"a tensor on {value.device.type} whose value cannot be read here")
        writer.out += data_bytes(hashlib.sha256(tensor_bytes(data)).digest())
        if size and known is None:
            start = value.data_ptr()
            name = writer.numbers.place(value)
            walk.spans.append((start, start + tensor_span(value), name))
    if known is None:
        writer.put_state(value, TENSOR_NOTES)
    else:
        writer.out += b"N"


def _put_size(writer: KeyWriter, value: torch.Size) -> None:
    writer.head(b"size", len(value))
    writer.put_items(tuple.__iter__(value))


def _put_by_text(kind: bytes) -> Handler:
    def put(writer: KeyWriter, value: Any) -> None:
        writer.head(kind, 1)
        writer.text(str(value))

    return put


def _put_device(writer: KeyWriter, value: torch.device) -> None:
    # An index is where a process happens to run, not what it computes.
    writer.head(b"device", 1)
    writer.text(value.type)


UNFINISHED = frozenset({torch.nn.parameter.UninitializedParameter, torch.nn.parameter.UninitializedBuffer})
"""What the modules of ``torch.nn`` that are called lazy have before their first call."""

HF_NOTES = frozenset(
    {
        "_is_hf_initialized",
        "name_or_path",
        "_name_or_path",
        "_commit_hash",
        "transformers_version",
        "_original_object_hash",
        "__validators__",
        "__class_validators__",
    }
)
"""What transformers keeps for itself: where a model came from, a hash that moves with the seed, and checks
that run when a field of a configuration is set."""

HF_SETS = frozenset({"_no_split_modules", "_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"})
"""Attributes of transformers' models that hold sets of names for placing weights: only asked ``in``.
Their order would move with the hash seed, and with it the key of most models."""

TENSOR_NOTES = frozenset({"_is_hf_initialized"})
"""What it leaves on any module and tensor."""


def own_attributes(value: torch.Tensor) -> dict[str, Any]:
    """What somebody noted on a tensor, as far as it counts: the same on a fake as on the real one."""
    fake = is_fake(value)
    return {
        name: noted
        for name, noted in value.__dict__.items()
        if name not in TENSOR_NOTES and not (fake and (name in FAKE_INTERNALS or "_memo" in name))
    }


def ignored_names(cls: type) -> frozenset[str]:
    """Attributes of a class or its instances that say where they came from, not what they compute."""
    if any((base.__module__ or "").partition(".")[0] == "transformers" for base in cls.__mro__):
        return HF_NOTES
    return TENSOR_NOTES


def check_bound(writer: KeyWriter, value: torch.Tensor) -> None:
    """Refuse a parameter or buffer that is a tensor subclass or quantized: metadata does not stand for it."""
    if value.is_quantized or (not is_plain_tensor(value) and not is_fake(value)):
        raise writer.error(f"a {type(value).__name__}, whose metadata does not stand for it")


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether a call of the module runs hooks."""
    state = module.__dict__
    return any(map(state.get, HOOKS))


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


def put_module(writer: KeyWriter, module: torch.nn.Module) -> None:
    """Write a module that is a value: held in a list or a closure, out of the model's own tree.

    Its parameters and buffers become constants of the artifact, so they are written by value.
    """
    if writer.again(module):
        return
    writer.head(b"nn module", 7)
    writer.put_class(type(module))
    state = module.__dict__
    writer.put(bool(module.training))
    for kind in ("_parameters", "_buffers", "_modules"):
        part = state.get(kind, {})
        writer.head(b"part", 2 * len(part))
        writer.path.append(f".{kind}")
        writer.put_pairs(part.items())
        writer.path.pop()
    put_hooks(writer, module)
    writer.put_state(module, INTERNALS | ignored_names(type(module)))


HANDLERS: Mapping[type, Handler] = {
    torch.Tensor: put_tensor,
    torch.nn.Parameter: put_tensor,
    torch.nn.Buffer: put_tensor,
    torch.Size: _put_size,
    torch.device: _put_device,
    torch.dtype: _put_by_text(b"dtype"),
    torch.layout: _put_by_text(b"layout"),
    torch.memory_format: _put_by_text(b"memory format"),
}

FAMILIES: list[tuple[type, Handler]] = [
    (torch.Tensor, put_tensor),
    (torch.Generator, refuse("gives other numbers each time")),
    (torch.ScriptObject, refuse("holds state made in C++")),
    (torch.jit.ScriptFunction, refuse("holds compiled TorchScript")),
    (torch.jit.ScriptModule, refuse("holds compiled TorchScript")),
    (torch.nn.Module, put_module),
]
