"""Factors of a model: its classes, tree, parameters, plain attributes, hooks and configuration."""

from __future__ import annotations

from collections.abc import Iterator
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch

from stitchcache import encoding
from stitchcache.containers import put_members
from stitchcache.encoding import LONG, SCALARS, UnkeyableError, make_factor, text_bytes
from stitchcache.keys import values
from stitchcache.keys.code import replaced_factor
from stitchcache.keys.walk import Walk
from stitchcache.torchside import COMPILED_CALL, INTERNALS, TRANSIENT_BUFFERS
from stitchcache.types import Factor

_DEEPEST = 4  # containers in one another, of which the readable form shows items
_SHOWN = 3  # distinct values that an attribute's readable form lists


def readable(value: Any, called: str = "", room: int = LONG, depth: int = 0) -> str:
    """A short form of a value that holds no address, for people; of a container, the first items.

    ``called`` is its name, which may say that it is secret.
    """
    if type(value) in (str, bytes) and not encoding.is_telling(called, str(value[:1000])):
        return f"{type(value).__name__} of {len(value)} (not shown)"
    if type(value) is int and abs(value) >> 999:
        # Python may refuse to write it.
        return f"an int of {value.bit_length()} bits"
    if type(value) in SCALARS or isinstance(value, (torch.dtype, torch.device)):
        return encoding.shorten(repr(value), 40)
    if type(value) in {list, tuple, dict} and value and depth < _DEEPEST:
        texts, named = list[str](), type(value) is dict
        for key, item in value.items() if named else enumerate(value):
            if room <= 0:
                texts.append("...")
                break
            text = readable(item, key if named and type(key) is str else called, room, depth + 1)
            texts.append(f"{readable(key, '', room, depth + 1)}: {text}" if named else text)
            room -= len(texts[-1])
        return f"{{{', '.join(texts)}}}" if named else f"[{', '.join(texts)}]"
    if type(value) in {list, tuple, set, frozenset, dict}:
        return f"{type(value).__name__} of {len(value)}"
    # Others are not asked: a __getattr__ of theirs may raise anything.
    named = isinstance(value, (type, FunctionType, MethodType, BuiltinFunctionType))
    name = getattr(value, "__qualname__", None) if named else None
    return encoding.shorten(name if isinstance(name, str) else type(value).__qualname__, 60)


def model_factors(model: torch.nn.Module, walk: Walk | None = None) -> tuple[Factor, ...]:
    """Everything about a model that a trace may depend on, as factors; none of its code is run.

    In the walk over a key the model comes first, so that its factors depend on nothing else. An
    UnkeyableError names the attribute for which no key stands.
    """
    try:
        return tuple(_ModelWalk(model, walk or Walk()).factors())
    except RecursionError as error:
        why = "the model's attributes are nested too deep; keep such data out of the model"
        raise UnkeyableError("", why) from error


class _ModelWalk:
    def __init__(self, model: torch.nn.Module, walk: Walk) -> None:
        self.model = model
        self.walk = walk
        self.numbers = walk.numbers
        self.writer = walk.writer("model")
        self.modules: list[tuple[str, torch.nn.Module]] = []
        self.tree = bytearray()
        self.kinds = walk.writer("model.tree")
        self.labels: dict[type, tuple[str, bytes]] = {}
        self.described: dict[tuple[Any, ...], tuple[bytes, int]] = {}

    def factors(self) -> Iterator[Factor]:
        """All factors of the model."""
        self._visit("", self.model)
        yield make_factor("model.class", self.labels[type(self.model)][0])
        yield make_factor("model.tree", f"{len(self.modules)} modules", bytes(self.tree + self.kinds.out))
        training = [path or "(model)" for path, module in self.modules if module.training]
        shown = ", ".join(training[:8]) or "all off"
        yield make_factor("model.training", shown, b"".join(map(text_bytes, training)))
        yield from self._tensors()
        config = self.model.__dict__.get("config")
        known = config is None or type(config) in self.writer.handlers
        if not known and encoding.layout_of(type(config))[0]:
            yield from self._config(config)
        yield from self._attributes()
        yield self._hooks()
        bases = dict.fromkeys(base for cls in self.labels for base in cls.__mro__)
        of_torch = [base for base in bases if self.walk.is_versioned(base.__module__)]
        yield replaced_factor(self.walk, "model.torch_classes", of_torch)
        yield from class_factors(self.walk, "model.code")
        yield memory_factor(self.walk, "model.aliases")

    def _visit(self, path: str, module: torch.nn.Module) -> None:
        """List the tree; a module that occurs twice is named by its first path."""
        if id(module) in self.numbers:
            self.tree += text_bytes(path) + (self.numbers.reference(module) or b"")
            return
        if not isinstance(module, torch.nn.Module):
            raise UnkeyableError(path, f"a {type(module).__name__} is no module; register modules only")
        self.numbers.add(module, "module", path, 0)
        self.modules.append((path, module))
        children = module._modules
        cls = type(module)
        label = self.labels.get(cls)
        if label is None:
            name = self.writer.class_label(cls)
            label = self.labels[cls] = (name, text_bytes(name))
            # Once a class: what its body holds follows where its name does not lead to it.
            self.kinds.put_class(cls)
        self.tree += b"%b%bi%d;" % (text_bytes(path), label[1], len(children))
        for name, child in children.items():
            if "." in name:
                raise UnkeyableError(path, f"a module is called {name!r}; a name must hold no dot")
            if child is None:
                self.tree += text_bytes(name) + b"N"
            else:
                self._visit(f"{path}.{name}" if path else name, child)

    def _tensors(self) -> Iterator[Factor]:
        lines = {"parameters": bytearray(), "buffers": bytearray()}
        noted: list[tuple[str, dict[str, Any]]] = []
        for path, module in self.modules:
            state = module.__dict__
            transient = state[TRANSIENT_BUFFERS]
            prefix = f"{path}." if path else ""
            for kind, found in lines.items():
                for name, value in state[f"_{kind}"].items():
                    full = prefix + name
                    found += text_bytes(full)
                    found += b"N" if value is None else self._tensor(full, value, noted)
                    found += b"T" if name in transient else b"F"
        for kind, found in lines.items():
            count = sum(len(module.__dict__[f"_{kind}"]) for _, module in self.modules)
            yield make_factor(f"model.{kind}", f"{count} tensors", bytes(found))
        notes = self.walk.writer("model.tensor_attributes")
        for name, own in noted:
            notes.text(name)
            notes.path = [name]
            notes.put(own)
        yield make_factor("model.tensor_attributes", f"{len(notes.out)} bytes", bytes(notes.out))

    def _tensor(self, name: str, value: torch.Tensor, noted: list[tuple[str, dict[str, Any]]]) -> bytes:
        """A parameter or buffer; what it shares with others is kept for later."""
        if id(value) in self.numbers:
            return self.numbers.reference(value) or b""
        self.numbers.add(value, values.BOUND, name, 0)
        if value.__dict__ and (own := values.own_attributes(value)):
            noted.append((name, own))
        if type(value) in values.UNFINISHED or value.is_nested:
            # These have no sizes to ask for.
            kind = type(value).__name__
            raise UnkeyableError(name, f"a {kind} that is nested or not initialized; use plain tensors")
        # Layers repeat: the same few descriptions serve for all tensors of a deep model.
        strides = value.stride() if value.layout is torch.strided else value.layout
        flags = value.is_conj(), value.is_neg(), value.is_leaf and value.grad is not None
        what = (value.shape, strides, value.dtype, value.device, value.requires_grad, flags, type(value))
        described = self.described.get(what)
        if described is None:
            if value.is_quantized or not values.stands_for_itself(value):
                kind = type(value).__name__
                why = f"a {kind}, whose content a key cannot describe; use plain tensors"
                raise UnkeyableError(name, why)
            text = f"{values.tensor_text(value)} {value.requires_grad} {flags}"
            described = self.described[what] = (text_bytes(text), values.tensor_span(value))
        if described[1]:
            start = value.data_ptr()
            self.walk.spans.append((start, start + described[1], name))
        return described[0]

    def _attributes(self) -> Iterator[Factor]:
        # By attribute: its bytes, module by module, and some of its values for people.
        attributes: dict[type, dict[str, tuple[bytearray, dict[bytes, str]]]] = {}
        known = {cls: (INTERNALS | values.ignored_names(cls), encoding.slots_of(cls)) for cls in self.labels}
        orders: dict[tuple[str, ...], int] = {}
        order = bytearray()
        for path, module in self.modules:
            cls, module_bytes = type(module), text_bytes(path)
            columns = attributes.setdefault(cls, {})
            items = encoding.state_of(module, *known[cls])
            order += b"i%d;" % orders.setdefault(tuple([name for name, _ in items]), len(orders))
            for name, value in items:
                if name not in columns:
                    columns[name] = bytearray(), {}
                parts, shown = columns[name]
                scalar = SCALARS.get(type(value))
                encoded = scalar(value) if scalar is not None else self._encode(path, name, value, module)
                parts += module_bytes + encoded
                if len(shown) <= _SHOWN and encoded not in shown:
                    shown[encoded] = readable(value, name)
        for cls, columns in attributes.items():
            for name, (parts, shown) in columns.items():
                texts = [*shown.values()][:_SHOWN] + ["..."] * (len(shown) > _SHOWN)
                label = f"model.attributes.{self.labels[cls][0]}.{name}"
                yield make_factor(label, ", ".join(texts), bytes(parts))
        for names in orders:
            order += b"i%d;" % len(names) + b"".join(map(text_bytes, names))
        yield make_factor("model.attribute_order", f"{len(orders)} orders", bytes(order))

    def _encode(self, path: str, name: str, value: Any, owner: Any) -> bytes:
        writer = self.writer
        if name == COMPILED_CALL:
            raise UnkeyableError(path, "Module.compile() was called; pass the model as it was before")
        if name == "_flat_weights" and isinstance(owner, torch.nn.RNNBase) and _are_own(owner, value):
            # Export puts its own tensors there as it does among the parameters.
            return b"[flat weights 0:"
        step = f".{name}"
        writer.begin(step, path, [path, step])
        hf_set = name in values.HF_SETS and type(value) is set
        if hf_set and values.ignored_names(type(owner)) >= values.HF_NOTES:
            put_members(writer, value)
        else:
            writer.put(value)
        return bytes(writer.out)

    def _config(self, config: Any) -> Iterator[Factor]:
        """One factor for each field of the model's configuration, which modules usually share."""
        self.numbers.add(config, "config", "", 0)
        kind = self.walk.writer("model.config", path=["config"])
        kind.put_class(type(config))
        items = encoding.state_of(config, values.ignored_names(type(config)), encoding.slots_of(type(config)))
        for name, value in items:
            data = self._encode("(config)", name, value, config)
            yield make_factor(f"model.config.{name}", readable(value, name), data)
        names = b"".join(text_bytes(name) for name, _ in items)
        yield make_factor("model.config_order", f"{len(items)} fields", bytes(kind.out) + names)

    def _hooks(self) -> Factor:
        writer = self.walk.writer("model.hooks")
        hooked = [(path, module) for path, module in self.modules if values.has_hooks(module)]
        for path, module in hooked:
            writer.path = [path]
            writer.text(path)
            values.put_hooks(writer, module)
        names = ", ".join(path or "(model)" for path, _ in hooked)
        return make_factor("model.hooks", names or "none", bytes(writer.out))


def class_factors(walk: Walk, name: str) -> Iterator[Factor]:
    """For each Python module whose classes were met and not yet written: what their bodies hold."""
    modules: dict[str, list[tuple[str, bytes]]] = {}
    for cls in walk.unwritten_classes():
        written = (cls.__qualname__, walk.contents(cls))
        modules.setdefault(walk.label(cls.__module__), []).append(written)
    for module, classes in sorted(modules.items()):
        classes.sort()
        names = ", ".join(label for label, _ in classes)
        yield make_factor(f"{name}.{module}", names, b"".join(contents for _, contents in classes))


def memory_factor(walk: Walk, name: str) -> Factor:
    """Tensors and arrays that share memory without being one object: writing to one changes the other."""
    found: list[tuple[str, bytes]] = []
    end, owner, base = 0, "", 0
    for start, stop, label in sorted(walk.spans):
        if start < end:
            place = b"i%d;i%d;" % (start - base, stop - base)
            text = f"{label!r} in {owner!r} at {start - base}"
            found.append((text, text_bytes(label) + text_bytes(owner) + place))
        if stop > end:
            end, owner, base = stop, label, start
    # What lies first in memory differs between processes.
    found.sort()
    return make_factor(name, ", ".join(text for text, _ in found) or "none", b"".join(b for _, b in found))


def _are_own(module: torch.nn.RNNBase, value: Any) -> bool:
    """Whether a list is that of a recurrent module's own parameters, as torch keeps it for fast calls."""
    names = module.__dict__.get("_flat_weights_names")
    if type(value) is not list or type(names) is not list:
        return False
    return [id(module._parameters.get(name)) for name in names] == list(map(id, value))
