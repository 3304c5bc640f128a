"""What a piece backend is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch

BoxedPiece = Callable[[list[Any]], Sequence[Any]]
"""A loaded piece: takes one list of tensors, returns a sequence of tensors."""


class Backend(Protocol):
    """Compiles graphs to files and loads files as callables.

    Attributes:
        name: As users write it, and as entries record it.
        parallel: Whether pieces may be compiled in forked processes.
    """

    name: str
    parallel: bool

    def require(self) -> None:
        """Check that this backend can compile here.

        Raises:
            CompilerMissingError: It needs a C++ compiler and there is none.
        """

    def wants_warming(self) -> bool:
        """Whether :meth:`warm` would do anything."""

    def warm(self, devices: Collection[str], options: Mapping[str, Any], before: int) -> None:
        """Fill caches on disk that compiling reads. Runs in a forked process of its own.

        Args:
            devices: Device types in use.
            options: Backend options.
            before: Pieces that this backend has compiled on the store until now.
        """

    def prepare(self, devices: Collection[str], options: Mapping[str, Any]) -> None:
        """Do once what every compile would do again: imports, probes of the machine.

        Args:
            devices: Device types in use.
            options: Backend options.
        """

    def tuned(
        self, devices: Collection[str], options: Mapping[str, Any], before: int, pieces: int
    ) -> Mapping[str, Any]:
        """Options that compile the same soonest; after :meth:`prepare`.

        Args:
            devices: Device types in use.
            options: Backend options; what they settle stays.
            before: Pieces that this backend has compiled on the store until now.
            pieces: Pieces about to be compiled.

        Returns:
            Options for :meth:`build`.
        """

    def settled(self, devices: Collection[str], options: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Around compiling, after :meth:`prepare`: what could not change anything is skipped meanwhile."""

    def foreign_ops(self, piece: torch.fx.GraphModule) -> set[str]:
        """Ops that this backend cannot compile and that must be called between pieces instead."""

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

    def load(self, path: Path, device: str) -> BoxedPiece:
        """Load a compiled piece in place.

        Args:
            path: The stored file.
            device: Where it runs: ``cpu``, or ``cuda:1``.

        Raises:
            BackendError: The file cannot be loaded here.
        """
