"""How torch's own values are written: dtypes, devices, tensors, operators.

A parameter or buffer is known by its metadata, because artifacts take it from the model by name. Any other
tensor that a model holds becomes a constant of the artifact, so its value is part of the key.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from stitchcache.keys.values import Encoder, Handler
from stitchcache.types import span

MAX_TENSOR_BYTES = 64 << 20
"""Largest tensor that is read for a key; reading more would cost longer than a trace saves."""

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


def tensor_bytes(value: torch.Tensor) -> bytes:
    """The bytes that a strided CPU tensor spans.

    Read through its address, not through an operator: capture may run, and its modes would see the call.
    """
    count = span(value.shape, value.stride())
    return ctypes.string_at(value.data_ptr(), count * value.element_size()) if count else b""


def put_tensor(encoder: Encoder, value: torch.Tensor) -> None:
    """Write a tensor by value.

    Raises:
        UnkeyableError: Its value cannot be read: a subclass, a fake, a sparse or a huge one.
    """
    if encoder.again(value):
        return
    if not is_plain_tensor(value) or value.layout is not torch.strided or value.is_quantized:
        raise encoder.error(f"a {type(value).__name__} tensor whose value cannot be read; make it a buffer")
    encoder.out += b"V"
    encoder.text(f"{tensor_text(value)} {value.requires_grad} {value.is_conj()} {value.is_neg()}")
    if value.device.type == "meta":
        return
    if value.numel() * value.element_size() > MAX_TENSOR_BYTES:
        raise encoder.error(f"a tensor of {value.numel()} elements outside of the buffers; make it a buffer")
    data = value if value.device.type == "cpu" else value.detach().cpu()
    if not is_plain_tensor(data):
        raise encoder.error(f"a tensor on {value.device.type} whose value cannot be read here")
    encoder.out += hashlib.sha256(tensor_bytes(data)).digest()
    if value.__dict__:
        encoder.put_state(value, frozenset({"_is_hf_initialized"}))


def _put_size(encoder: Encoder, value: torch.Size) -> None:
    encoder.out += b"Z"
    encoder.text(str(tuple(value)))


def _put_text_form(encoder: Encoder, value: Any) -> None:
    encoder.out += b"X"
    encoder.text(str(value))


def _put_device(encoder: Encoder, value: torch.device) -> None:
    # An index is where a process happens to run, not what it computes.
    encoder.out += b"v"
    encoder.text(value.type)


def put_numpy(encoder: Encoder, value: Any) -> None:
    """Write a numpy array or scalar by value."""
    if value.dtype.hasobject:
        raise encoder.error("a numpy array of objects")
    encoder.out += b"U"
    encoder.text(f"{type(value).__name__} {value.dtype.str} {value.dtype.descr!r} {value.shape}")
    data = value.tobytes()
    encoder.out += b"%d:" % len(data) + data


def put_numpy_dtype(encoder: Encoder, value: Any) -> None:
    """Write a numpy data type."""
    encoder.out += b"w"
    encoder.text(f"{value.str} {value.descr!r}")


def _refuse(why: str) -> Handler:
    def put(encoder: Encoder, value: Any) -> None:
        raise encoder.error(f"a {type(value).__name__} {why}")

    return put


HANDLERS: Mapping[type, Handler] = {
    torch.Tensor: put_tensor,
    torch.nn.Parameter: put_tensor,
    torch.nn.Buffer: put_tensor,
    torch.Size: _put_size,
    torch.device: _put_device,
    torch.dtype: _put_text_form,
    torch.layout: _put_text_form,
    torch.memory_format: _put_text_form,
}

FAMILIES: list[tuple[type, Handler]] = [
    (torch.Tensor, put_tensor),
    (torch.Generator, _refuse("gives other numbers each time")),
    (torch.ScriptObject, _refuse("holds state made in C++")),
    (torch.jit.ScriptFunction, _refuse("holds compiled TorchScript")),
    (torch.jit.ScriptModule, _refuse("holds compiled TorchScript")),
]
