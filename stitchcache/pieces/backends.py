"""What a piece backend is, and the two that compile with Inductor.

A warm start imports this file and builds nothing: what compiles is in ``compiling``, imported by the methods.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from stitchcache.errors import BackendError
from stitchcache.torchside import inductor
from stitchcache.torchside.ops import OpOverload

BoxedPiece = Callable[[list[Any]], Sequence[Any]]
"""A loaded piece: takes one list of tensors, returns a sequence of tensors."""

# Namespaces whose ops Inductor knows how to call from C++. Any other op would go through a proxy
# that needs a second file beside the library and is slower than a call from the stitching code.
_NATIVE = {"aten", "prims", "prim", "inductor", "_quantized", "quantized_decomposed"}
# Random ops that AOTInductor leaves to eager's own kernels, so that they draw eager's numbers.
_RANDOM = {"rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "bernoulli", "dropout"}


class Backend:
    """Compiles graphs to files and loads files as callables.

    Attributes:
        name: As users write it, and as entries record it.
    """

    name: str

    def require(self) -> None:
        """Check that this backend can compile here.

        Raises:
            CompilerMissingError: It needs a C++ compiler and there is none.
        """

    def wants_warming(self) -> bool:
        """Whether :meth:`warm` would do anything."""
        return False

    def warm(self, devices: Collection[str], options: Mapping[str, Any]) -> None:
        """Fill caches on disk that compiling reads. Runs in a forked process of its own.

        Args:
            devices: Device types in use.
            options: Backend options.
        """

    def prepare(self, devices: Collection[str], options: Mapping[str, Any]) -> None:
        """Do once what every compile would do again; forked children inherit it.

        Args:
            devices: Device types in use.
            options: Backend options.
        """

    def around_compiling(
        self, devices: Collection[str], options: Mapping[str, Any]
    ) -> AbstractContextManager[None]:
        """A block that compiles, after :meth:`prepare`: what cannot change anything is skipped in it."""
        return nullcontext()

    def options_for(
        self, devices: Collection[str], options: Mapping[str, Any], pieces: int
    ) -> Mapping[str, Any]:
        """Options that compile so many pieces soonest, to the same result.

        Args:
            devices: Device types in use.
            options: Backend options; what they say stays.
            pieces: Pieces about to be compiled.
        """
        return options

    def foreign_ops(self, piece: torch.fx.GraphModule) -> set[str]:
        """Ops that this backend cannot compile and that must be called between pieces instead."""
        return set()

    def build(self, piece: torch.fx.GraphModule, directory: Path, options: Mapping[str, Any]) -> Path:
        """Compile a piece.

        Args:
            piece: Its placeholders carry fake tensors in ``meta["val"]``; it returns a tuple.
            directory: An empty directory to work in.
            options: Backend options, as ``torch.compile(options=...)`` takes them.

        Returns:
            The file to store.

        Raises:
            BackendError: It cannot be compiled.
        """
        raise NotImplementedError

    def load(self, path: Path, device: str) -> BoxedPiece:
        """Load a compiled piece in place.

        Args:
            path: The stored file.
            device: Where it runs: ``cpu``, or ``cuda:1``.

        Raises:
            BackendError: The file cannot be loaded here.
        """
        raise NotImplementedError


class _Compiled(Backend):
    """What both backends that compile with Inductor have in common."""

    def require(self) -> None:
        """Check for a C++ compiler."""
        from stitchcache.pieces.compiling import require_compiler

        require_compiler(self.name)

    def wants_warming(self) -> bool:
        """With a compiler, yes."""
        from stitchcache.pieces.compiling import find_compiler

        return find_compiler() is not None

    def warm(self, devices: Collection[str], options: Mapping[str, Any]) -> None:
        """Leave the probes of the CPU on disk, which takes half of Inductor's imports only."""
        if "cpu" in devices:
            inductor.probe_best(options)

    def prepare(self, devices: Collection[str], options: Mapping[str, Any]) -> None:
        """Import Inductor and probe the CPU."""
        inductor.import_compiler()
        self.warm(devices, options)

    def around_compiling(
        self, devices: Collection[str], options: Mapping[str, Any]
    ) -> AbstractContextManager[None]:
        """Skip probes of the CPU that could not change anything."""
        return inductor.few_probes(options, "cpu" in devices)


class AotiBackend(_Compiled):
    """AOTInductor: one shared library a piece. Loading one imports neither Inductor nor Dynamo."""

    name = "aoti"

    def options_for(
        self, devices: Collection[str], options: Mapping[str, Any], pieces: int
    ) -> Mapping[str, Any]:
        """Do without precompiled headers where they cost more than they save."""
        from stitchcache.pieces.compiling import header_options

        return {**header_options(devices, pieces), **options}

    def foreign_ops(self, piece: torch.fx.GraphModule) -> set[str]:
        """Custom ops, and random ops that would draw other numbers: they are called between pieces."""
        # A warm start plans nothing.
        from stitchcache.graph.effects import is_random

        return {
            str(node.target).replace(".", "::", 1)
            for node in piece.graph.nodes
            if isinstance(node.target, OpOverload)
            and (
                node.target.namespace not in _NATIVE
                or (is_random(node) and str(node.target).split(".")[1] not in _RANDOM)
            )
        }

    def build(self, piece: torch.fx.GraphModule, directory: Path, options: Mapping[str, Any]) -> Path:
        """Compile a piece to a library."""
        from stitchcache.pieces.compiling import build_library

        return build_library(piece, directory, options)

    def load(self, path: Path, device: str) -> BoxedPiece:
        """Map a library."""
        try:
            return inductor.load_library(str(path), device)
        except RuntimeError as error:
            raise BackendError(
                f"{path} cannot be loaded: {str(error).splitlines()[0]}. If it lies on a file system "
                "mounted noexec, set STITCHCACHE_DIR to another; else run 'stitchcache verify --repair'.",
                backend=self.name,
            ) from error


class InductorBackend(_Compiled):
    """Inductor's standalone artifacts, for graphs that AOTInductor refuses.

    Loading one imports Inductor and, on the CPU, compiles the C++ again where Inductor's own cache is empty:
    seconds, and a compiler, where AOTInductor needs neither.
    """

    name = "inductor"

    def build(self, piece: torch.fx.GraphModule, directory: Path, options: Mapping[str, Any]) -> Path:
        """Compile a piece to what ``CompiledArtifact.save`` writes."""
        from stitchcache.pieces.compiling import build_artifact

        return build_artifact(piece, directory, options)

    def load(self, path: Path, device: str) -> BoxedPiece:
        """Load an artifact."""
        artifact = inductor.load_artifact(path)
        # It takes its inputs one by one, not as a list.
        return lambda inputs: artifact(*inputs)
