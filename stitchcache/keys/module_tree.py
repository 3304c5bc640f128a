"""Factors of a model: its classes, tree, parameters, plain attributes, hooks and configuration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field
from typing import TYPE_CHECKING, Any

import torch

from stitchcache.keys.code import put_function
from stitchcache.keys.digest import make_factor, shorten
from stitchcache.keys.encoder import class_contents, new_encoder
from stitchcache.keys.modules import (
    has_hooks,
    ignored_names,
    own_attributes,
    put_hooks,
    tensor_line,
)
from stitchcache.keys.origins import stands_by_version
from stitchcache.keys.tensors import is_plain_tensor
from stitchcache.keys.values import (
    SCALARS,
    Encoder,
    Shared,
    UnkeyableError,
    has_plain_state,
    slots_of,
    text_bytes,
)
from stitchcache.torchside.modules import COMPILED_CALL, INTERNALS, TRANSIENT_BUFFERS
from stitchcache.types import Factor, span

if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    from stitchcache.records import dataclass


_SHOWN = 3
"""Distinct values that an attribute's readable form lists."""

_FUNCTION = type(put_function)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelKey:
    """What can be known of a model without tracing it.

    Args:
        factors: Its factors, see docs/keys.md.
        unsound: Why no key stands for it, naming the attribute; ``None`` where one does.
    """

    factors: tuple[Factor, ...]
    unsound: str | None = None


@dataclass(slots=True)
class _Column:
    """One attribute over all modules of a class: what it held, module by module."""

    name: str
    parts: list[bytes] = field(default_factory=list)
    last: bytes = b""
    counts: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def add(self, module: bytes, encoded: bytes, value: Any) -> None:
        self.parts.append(b"%b%d:%b" % (module, len(encoded), encoded))
        if encoded == self.last:
            self.counts[-1] += 1
        elif len(self.texts) <= _SHOWN:
            self.last = encoded
            self.counts.append(1)
            self.texts.append(readable(value))

    def text(self) -> str:
        runs = zip(self.texts[:_SHOWN], self.counts, strict=False)
        shown = [text if count == 1 else f"{text} x{count}" for text, count in runs]
        return ", ".join(shown) + (", ..." if len(self.texts) > _SHOWN else "")


def readable(value: Any) -> str:
    """A short form of a value that holds no address, for people."""
    if type(value) in SCALARS or isinstance(value, (torch.dtype, torch.device)):
        return shorten(repr(value), 40)
    if type(value) in {list, tuple, set, frozenset, dict}:
        return f"{type(value).__name__} of {len(value)}"
    name = getattr(value, "__qualname__", None)
    return shorten(name if isinstance(name, str) else type(value).__qualname__, 60)


def model_factors(model: torch.nn.Module, shared: Shared | None = None) -> ModelKey:
    """Everything about a model that a trace may depend on, as factors.

    Args:
        model: The model; not changed, and none of its code is run.
        shared: Classes met elsewhere in the same key, such as in its inputs; their contents are keyed too.
    """
    shared = shared or Shared()
    try:
        return ModelKey(factors=tuple(_Walk(model, shared).factors()))
    except UnkeyableError as error:
        return ModelKey(factors=(), unsound=str(error))
    except RecursionError:
        return ModelKey(factors=(), unsound="the model's attributes are nested too deep")


class _Walk:
    """One pass over a model's tree."""

    def __init__(self, model: torch.nn.Module, shared: Shared) -> None:
        self.model = model
        self.shared = shared
        self.encoder = new_encoder(shared)
        self.modules: list[tuple[str, torch.nn.Module]] = []
        self.tree: list[str] = []
        self.labels: dict[type, str] = {}
        self.extents: list[tuple[int, int, str]] = []
        self.described: dict[tuple[Any, ...], tuple[str, int]] = {}

    def factors(self) -> Iterator[Factor]:
        """All factors of the model, most telling first."""
        self._visit("", self.model)
        cls = self._label(type(self.model))
        yield make_factor("model.class", cls)
        yield make_factor("model.tree", f"{len(self.modules)} modules", "\n".join(self.tree).encode())
        training = [path or "(model)" for path, module in self.modules if module.training]
        text = "all off" if not training else ", ".join(training[:8])
        yield make_factor("model.training", text, "\n".join(training).encode())
        yield from self._tensors()
        yield from self._attributes()
        yield self._hooks()
        yield self._torch_classes()
        yield from class_factors(self.shared)

    def _label(self, cls: type) -> str:
        label = self.labels.get(cls)
        if label is None:
            label = self.labels[cls] = self.encoder.class_label(cls)
            self.encoder.put_class(cls)
        return label

    def _visit(self, path: str, module: torch.nn.Module) -> None:
        """List the tree; a module that occurs twice is named by its first path."""
        known = self.encoder.seen.get(id(module))
        if known is not None:
            self.tree.append(f"{path!r} = {known.decode()!r}")
            return
        if not isinstance(module, torch.nn.Module):
            raise UnkeyableError(path, f"a {type(module).__name__} stands where a module should")
        self.encoder.seen[id(module)] = f"module {path}".encode()
        self.modules.append((path, module))
        self.tree.append(f"{path!r}: {self._label(type(module))}")
        for name, child in module._modules.items():
            if child is None:
                self.tree.append(f"{path!r}.{name!r}: None")
            else:
                self._visit(f"{path}.{name}" if path else name, child)

    def _tensors(self) -> Iterator[Factor]:
        lines: dict[str, list[str]] = {"parameters": [], "buffers": []}
        notes = new_encoder(self.shared)
        for path, module in self.modules:
            state = module.__dict__
            transient = state[TRANSIENT_BUFFERS]
            prefix = f"{path}." if path else ""
            for kind, found in lines.items():
                for name, value in state[f"_{kind}"].items():
                    full = prefix + name
                    text = "None" if value is None else self._tensor(full, value, notes)
                    found.append(f"{full!r} {text}{' transient' if name in transient else ''}")
        for kind, found in lines.items():
            payload = "\n".join(found).encode("utf-8", "surrogatepass")
            yield make_factor(f"model.{kind}", f"{len(found)} tensors", payload)
        overlaps = _overlaps(self.extents)
        yield make_factor("model.aliases", ", ".join(overlaps) or "none", "\n".join(overlaps).encode())
        yield make_factor("model.tensor_attributes", f"{len(notes.out)} bytes", bytes(notes.out))

    def _tensor(self, name: str, value: torch.Tensor, notes: Encoder) -> str:
        """A parameter or buffer in one line; what it shares with others is kept for later."""
        known = self.encoder.seen.get(id(value))
        if known is not None:
            return known.decode("utf-8", "surrogatepass")
        self.encoder.seen[id(value)] = f"tensor {name}".encode("utf-8", "surrogatepass")
        if value.__dict__ and (own := own_attributes(value)):
            notes.text(name)
            notes.put_at(name, own)
        if not is_plain_tensor(value) or value.layout is not torch.strided or value.is_quantized:
            return tensor_line(self.encoder, name, value)
        # Layers repeat: the same few descriptions serve for all tensors of a deep model.
        what = (value.shape, value.stride(), value.dtype, value.device, value.requires_grad)
        described = self.described.get(what)
        if described is None:
            size = span(value.shape, value.stride()) * value.element_size()
            described = self.described[what] = (tensor_line(self.encoder, name, value), size)
        if described[1] and value.device.type != "meta":
            start = value.data_ptr()
            self.extents.append((start, start + described[1], name))
        return described[0]

    def _attributes(self) -> Iterator[Factor]:
        config = self.model.__dict__.get("config")
        if config is not None and type(config) not in self.encoder.handlers and has_plain_state(type(config)):
            yield from self._config(config)
        known: dict[type, tuple[dict[str, _Column], frozenset[str], Any]] = {
            cls: ({}, INTERNALS | ignored_names(cls), slots_of(cls)) for cls in self.labels
        }
        for path, module in self.modules:
            cls = type(module)
            columns, skipped, slots = known[cls]
            module_bytes = text_bytes(path)
            items = [item for item in module.__dict__.items() if item[0] not in skipped]
            if slots:
                items += [(name, slot.__get__(module)) for name, slot in slots if hasattr(module, name)]
            for name, value in items:
                column = columns.get(name)
                if column is None:
                    column = columns[name] = _Column(f"model.attributes.{self.labels[cls]}.{name}")
                scalar = SCALARS.get(type(value))
                encoded = scalar(value) if scalar is not None else self._encode(path, name, value)
                column.add(module_bytes, encoded, value)
        for columns, _, _ in known.values():
            for column in columns.values():
                yield make_factor(column.name, column.text(), b"".join(column.parts))

    def _encode(self, path: str, name: str, value: Any) -> bytes:
        encoder = self.encoder
        if name == COMPILED_CALL:
            raise UnkeyableError(path, "Module.compile() was called; pass the model as it was before")
        encoder.out.clear()
        encoder.path = [path, f".{name}"]
        encoder.put(value)
        return bytes(encoder.out)

    def _config(self, config: Any) -> Iterator[Factor]:
        """One factor for each field of the model's configuration, which modules usually share."""
        encoder = self.encoder
        encoder.seen[id(config)] = b"config"
        encoder.put_class(type(config))
        ignored = ignored_names(type(config))
        for name, value in getattr(config, "__dict__", {}).items():
            if name not in ignored:
                data = self._encode("config", name, value)
                yield make_factor(f"model.config.{name}", readable(value), data)
        for name, descriptor in slots_of(type(config)):
            if hasattr(config, name):
                value = descriptor.__get__(config)
                data = self._encode("config", name, value)
                yield make_factor(f"model.config.{name}", readable(value), data)

    def _hooks(self) -> Factor:
        encoder = self.encoder
        encoder.out.clear()
        hooked = [(path, module) for path, module in self.modules if has_hooks(module)]
        for path, module in hooked:
            encoder.path = [path]
            encoder.text(path)
            put_hooks(encoder, module)
        names = ", ".join(path or "(model)" for path, _ in hooked)
        return make_factor("model.hooks", names or "none", bytes(encoder.out))

    def _torch_classes(self) -> Factor:
        """What somebody changed on torch's own module classes: methods from elsewhere, plain attributes."""
        encoder = new_encoder(self.shared)
        replaced = []
        bases = dict.fromkeys(base for cls in self.labels for base in cls.__mro__)
        for cls in bases:
            if not self.shared.is_versioned(cls.__module__):
                continue
            for name, value in cls.__dict__.items():
                if isinstance(value, _FUNCTION):
                    if not stands_by_version(value.__code__.co_filename):
                        replaced.append(f"{cls.__qualname__}.{name}")
                        encoder.text(replaced[-1])
                        encoder.put_at(replaced[-1], value)
                elif name[:2] != "__" and (scalar := SCALARS.get(type(value))) is not None:
                    encoder.text(f"{cls.__qualname__}.{name}")
                    encoder.out += scalar(value)
        return make_factor("model.torch_classes", ", ".join(replaced) or "as shipped", bytes(encoder.out))


def class_factors(shared: Shared) -> Iterator[Factor]:
    """One factor for each Python module whose classes a key met: methods and class attributes.

    Raises:
        UnkeyableError: A class attribute cannot be written soundly.
    """
    modules: dict[str, list[tuple[str, bytes]]] = {}
    done: set[int] = set()
    while len(done) < len(shared.classes):
        # A class's contents may name further classes.
        for identity, cls in list(shared.classes.items()):
            if identity not in done:
                done.add(identity)
                module = shared.main if cls.__module__ == "__main__" else cls.__module__
                modules.setdefault(module, []).append((cls.__qualname__, class_contents(shared, cls)))
    for module, classes in sorted(modules.items()):
        classes.sort()
        names = ", ".join(name for name, _ in classes)
        payload = b"".join(b"%d:" % len(contents) + contents for _, contents in classes)
        yield make_factor(f"model.code.{module}", names, payload)


def _overlaps(extents: list[tuple[int, int, str]]) -> list[str]:
    """Tensors that share memory without being one object: writing to one changes the other."""
    found = []
    extents.sort()
    end, owner, base = 0, "", 0
    for start, stop, name in extents:
        if start < end:
            found.append(f"{name!r} in {owner!r} at {start - base}")
        if stop > end:
            end, owner, base = stop, name, start
    return found


__all__ = ["Encoder", "ModelKey", "class_factors", "model_factors", "readable"]
