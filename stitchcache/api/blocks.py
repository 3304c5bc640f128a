"""``stitchcache.compile_blocks``: the repeated blocks of a module, compiled once and run in their place."""

from __future__ import annotations

import importlib
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from operator import is_
from typing import Any

import torch

from stitchcache.api.compile import compile
from stitchcache.cache import Cache, chosen_cache
from stitchcache.encoding import UnkeyableError
from stitchcache.errors import BindError, InputMismatchError, OptionError, check_kind
from stitchcache.keys.model import model_factors
from stitchcache.pipeline.find import check_model
from stitchcache.pipeline.look import verify
from stitchcache.runtime.model import CompiledModel
from stitchcache.state import taken_apart
from stitchcache.torchside import COMPILED_CALL

log = logging.getLogger("stitchcache")

_PLAIN = (dict, list, OrderedDict)
_BUNDLE = "stitchcache.bundle"


class CompiledBlocks:
    """Blocks of a module that run compiled: what :func:`compile_blocks` returns.

    Attributes:
        blocks: The blocks, by their names in the module.
    """

    def __init__(self, options: Mapping[str, Any], cache: Cache) -> None:
        self.blocks: dict[str, torch.nn.Module] = {}
        self._options, self._cache = options, cache
        self._known: list[tuple[CompiledModel, object]] = []
        self._calls: dict[str, _Block] = {}

    @property
    def compiled(self) -> dict[str, CompiledModel]:
        """What each block runs at present, by name; equal blocks run one entry."""
        return {name: block.variants[0] for name, block in self._calls.items()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what the blocks have run, adapters included, to a bundle signed with the user's own key.

        Args:
            path: The file, or a directory (a checkout of a repository on the Hub, say) that gets
                ``stitchcache.bundle``.

        Raises:
            UntrustedEntryError: There is no key to sign with.
            StoreError: An entry is not stored, or the file cannot be written.
        """
        # By name: an extra, which other starts have no use for.
        export = importlib.import_module("stitchcache.ext.export")
        hashes = dict.fromkeys(compiled.graph_hash for compiled, _ in self._known)
        export.export_bundle(self._cache, _bundle_at(path), list(hashes))

    def undo(self) -> None:
        """Let the blocks run as they were before."""
        for block in self.blocks.values():
            block.__dict__.pop(COMPILED_CALL, None)

    def add(self, name: str, block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compile a block with an example call, and run it in its place."""
        self.blocks[name] = block
        self._calls[name] = _Block(name, block, self._make)
        setattr(block, COMPILED_CALL, self._calls[name])
        self._calls[name].renew(args, kwargs)

    def _make(self, block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CompiledModel:
        """Bind the pieces of an equal block to this one's tensors, or start the block by itself."""
        kind = _kind_of(block)
        for known, of_kind in self._known:
            if kind is None or kind != of_kind:
                continue
            try:
                shared = _share(known, block)
                if self._options.get("check") != "none":
                    shared(*args, **kwargs)
                    shared.check = verify(block, shared, args, kwargs)
                if shared.check.state != "mismatch":
                    return shared
            except (BindError, InputMismatchError):
                # Its tensors are tied or laid out in another way, or it was compiled for other shapes.
                continue
        made = compile(block, args, kwargs, cache=self._cache, **self._options)
        self._known.append((made, kind))
        return made


def _kind_of(block: torch.nn.Module) -> object | None:
    """What tells blocks apart: all that a key says of a module. ``None`` where no key stands for it.

    What else a trace depends on is this process's, and blocks that were compiled go on through its changes.
    """
    try:
        factors = [(factor.name, factor.digest) for factor in model_factors(taken_apart(block))]
        return [*map(type, block.modules())], factors
    except UnkeyableError:
        return None


def _share(known: CompiledModel, block: torch.nn.Module) -> CompiledModel:
    """What a start for an equal block would give, without reading the cache; a ``BindError`` if none fits."""
    shared = CompiledModel(
        known.artifact,
        block,
        known._pieces,
        known._constants,
        cache_hit=known.cache_hit,
        objects=known._objects,
    )
    shared.came_from, shared.lookup, shared.changed = known.came_from, known.lookup, known.changed
    shared.timings = dict(known.timings)
    return shared


def _bundle_at(path: str | os.PathLike[str]) -> str:
    return os.path.join(path, _BUNDLE) if os.path.isdir(path) else os.fspath(path)


class _Block:
    """Called in place of a block. Looks each time whether the block is still what was compiled."""

    def __init__(self, name: str, block: torch.nn.Module, make: Callable[..., CompiledModel]) -> None:
        self._name, self._block, self._make = name, block, make
        self.variants: list[CompiledModel] = []  # for other shapes; the last one used comes first
        self._seen: list[tuple[Any, list[Any]]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._is_same():
            log.info("%s: the block has changed; it is looked up again", self._name)
            self.variants.clear()
            self.renew(args, kwargs)
        for place, compiled in enumerate(self.variants):
            try:
                result = compiled(*args, **kwargs)
            except InputMismatchError as error:
                reason = error
                continue
            if place:
                self.variants.insert(0, self.variants.pop(place))
            return result
        log.info("%s: looked up again, as it was compiled for other arguments: %s", self._name, reason)
        self.renew(args, kwargs)
        return self.variants[0](*args, **kwargs)

    def renew(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compile for a call, or load."""
        # The block is captured and compared as it is without us.
        own = self._block.__dict__.pop(COMPILED_CALL, None)
        try:
            self.variants.insert(0, self._make(self._block, args, kwargs))
        finally:
            if own is not None:
                setattr(self._block, COMPILED_CALL, own)
        self._seen = [
            (table, _items(table)) for module in self._block.modules() for table in _containers(vars(module))
        ]

    def _is_same(self) -> bool:
        """Whether each attribute, parameter, submodule and item of a plain container is the object it was.

        Identity is quick and safe: an equal object in place of another one costs a look-up.
        """
        for table, seen in self._seen:
            now = _items(table)
            if len(now) != len(seen) or not all(map(is_, now, seen)):
                return False
        return True


def _containers(table: Any) -> Iterator[Any]:
    """A table, and the plain containers in it."""
    yield table
    for value in _items(table):
        if type(value) in _PLAIN:
            yield from _containers(value)


def _items(table: Any) -> list[Any]:
    """What a container holds, the keys of a dict too."""
    return [*table, *table.values()] if isinstance(table, dict) else list(table)


def compile_blocks(
    module: torch.nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    blocks: Sequence[str] | Sequence[torch.nn.Module] | None = None,
    source: str | os.PathLike[str] | None = None,
    cache: Cache | None = None,
    **options: Any,
) -> CompiledBlocks:
    """Compile the repeated blocks of a module, or load them, and run them in place.

    Equal blocks share one entry and one set of pieces, each bound to its own tensors. The module is called
    once with the example, to see what its blocks are called with. Each call of a block looks whether the
    block is still what was compiled. After LoRA weights were loaded, swapped, scaled or unloaded it is looked
    up again: a state that was seen before is a hit, and only a new one is compiled. A call with other shapes
    likewise.

    Args:
        module: In evaluation mode; such as a diffusion transformer. Its blocks keep their names and weights.
        args: Example positional arguments of the module.
        kwargs: Example keyword arguments.
        blocks: Class names of the blocks, or the blocks. ``None`` takes ``_repeated_blocks`` of the module,
            as models of diffusers have it, or else the longest ``ModuleList`` of modules of one class.
        source: What ``save`` wrote, which is stored in the cache first: a file, or a directory with a
            ``stitchcache.bundle``, such as a snapshot in the local cache of the Hub. Its signer must be
            trusted.
        cache: Where to look and store; the default cache if ``None``.
        **options: As for :func:`stitchcache.compile`, for each block.

    Returns:
        The compiled blocks, with ``compiled`` by name and ``undo()``.

    Raises:
        OptionError: The module has no such blocks, or an argument makes no sense.
        EntryFormatError: ``source`` is damaged; nothing of it was stored.
        UntrustedEntryError: ``source`` is not signed by a key that is trusted.
        StoreError: ``source`` cannot be read, or not be stored.
        ModelMismatchError: A compiled block does something else than the block, on the example.
        CaptureError: A block cannot be captured.
        BackendError: A piece cannot be compiled.
        CacheMissError: As for :func:`stitchcache.compile`.
    """
    check_model(module, args, {} if kwargs is None else kwargs)
    wanted = _blocks(module, blocks)
    if taken := [name for name, each in wanted.items() if getattr(each, COMPILED_CALL) is not None]:
        said = f"{', '.join(taken)} run compiled already. Call undo() of what compiled them first."
        raise OptionError(f"{type(module).__name__}: {said}", option="blocks")
    made = CompiledBlocks(options, chosen_cache(cache))
    if source is not None:
        importlib.import_module("stitchcache.ext.bundle").import_bundle(made._cache, _bundle_at(source))
    hooks: dict[str, Any] = {}

    def first_call(name: str, block: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        hooks.pop(name).remove()
        # Before the block has run: what a run leaves in caches of functions cannot be in a key.
        made.add(name, block, given, named)

    for name, block in wanted.items():
        hooks[name] = block.register_forward_pre_hook(partial(first_call, name), with_kwargs=True)
    with ExitStack() as failed:
        # The user's module runs here: whatever it raises, Ctrl-C too, its blocks are then as they were.
        failed.callback(made.undo)
        try:
            with torch.no_grad():
                module(*args, **(kwargs or {}))
        finally:
            for each in hooks.values():
                each.remove()
        failed.pop_all()
    if not made.blocks:
        said = f"calls none of {', '.join(wanted)} on the example. Give one that does, or name other blocks."
        raise OptionError(f"{type(module).__name__} {said}", option="blocks")
    return made


def _blocks(
    module: torch.nn.Module, blocks: Sequence[str] | Sequence[torch.nn.Module] | None
) -> dict[str, torch.nn.Module]:
    """The blocks by name, in the module's order."""
    named = dict(module.named_modules())
    given = (getattr(module, "_repeated_blocks", None) or None) if blocks is None else blocks
    if given is None:
        lists = [each for each in named.values() if isinstance(each, torch.nn.ModuleList) and len(each) > 1]
        alike = [each for each in lists if len({type(block) for block in each}) == 1]
        given = list(max(alike, key=len, default=()))
    check_kind("blocks", given, (list, tuple, torch.nn.ModuleList), "a list of class names, or of modules")
    names = {each for each in given if isinstance(each, str)}
    ids = {id(each) for each in given if isinstance(each, torch.nn.Module)}
    found = {name: each for name, each in named.items() if type(each).__name__ in names or id(each) in ids}
    if len(found) == 0 or len(ids) > len({id(each) for each in found.values()} & ids):
        said = "has no such blocks. Give the names of their classes, or the modules themselves."
        raise OptionError(f"blocks={blocks!r}: {type(module).__name__} {said}", option="blocks")
    return found
