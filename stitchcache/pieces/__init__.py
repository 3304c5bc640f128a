"""Pieces: graphs that are compiled, each into a file, and loaded from it. A backend does both."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stitchcache.errors import OptionError

if TYPE_CHECKING:
    from dataclasses import dataclass

    from torch.fx import GraphModule
else:
    from stitchcache.records import dataclass

NAMES = ("aoti", "inductor", "eager")

COMPILER_OPTIONS = {"fallback_random": True}
"""Options that compiled pieces get unless the user says otherwise. Random ops draw eager's numbers under
eager's seed; Inductor's own generator is quicker and draws others."""

FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError, ArithmeticError)
"""What code that is not ours may raise on values that it was never meant for."""

Options = Mapping[str, Any]
"""Options of a backend, as ``torch.compile(options=...)`` takes them."""

BoxedPiece = Callable[[list[Any]], Sequence[Any]]
"""A loaded piece: takes one list of tensors, returns a sequence of tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What is to be compiled: one call of a piece in the stitching graph.

    Args:
        name: Submodule name.
        key: Equal for equal pieces, in this model or another.
        gm: Its graph; not changed. Placeholders carry fake tensors in ``meta["val"]``; it returns a tuple.
        backend: ``eager`` where the wanted backend cannot keep its meaning.
    """

    name: str
    key: str
    gm: GraphModule
    backend: str


class Backend:
    """Compiles pieces to files and loads files as callables: :meth:`compile` and :meth:`load` are its job.

    The other methods may stay as they are. All that compiles runs in forked children where there can be some.

    Attributes:
        name: As users write it, and as entries record it.
    """

    name: str

    def compile(self, piece: GraphModule, directory: Path, options: Options) -> Path:
        """Compile a piece.

        Args:
            piece: A copy of its graph, which may be changed.
            directory: An empty directory to work in.
            options: From :meth:`prepare`.

        Returns:
            The file to store.

        Raises:
            BackendError: It cannot be compiled, or not to one file.
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

    def foreign_ops(self, piece: GraphModule) -> set[str]:
        """Ops that this backend cannot compile and that must be called between pieces instead."""
        return set()

    def warmth(self, devices: Collection[str], options: Options) -> Callable[[], object] | None:
        """What fills caches on disk that compiling reads; it is called in a process of its own."""
        return None

    def prepare(self, devices: Collection[str], options: Options, pieces: int) -> Options:
        """Do once what every compile would do again; forked children inherit it.

        Args:
            devices: Device types in use.
            options: The user's; what they say stays.
            pieces: Pieces about to be compiled.

        Returns:
            Options that compile so many pieces soonest, to the same result.

        Raises:
            CompilerMissingError: It needs a C++ compiler and there is none.
        """
        return options

    def around_compiling(self, devices: Collection[str], options: Options) -> AbstractContextManager[None]:
        """A block that compiles, after :meth:`prepare`: what cannot change anything is skipped in it."""
        return nullcontext()


def get_backend(name: str) -> Backend:
    """Find a backend by name; an OptionError if there is no such."""
    # Imported one by one: a warm start loads pieces of one backend only.
    if name == "eager":
        from stitchcache.pieces.eager import EagerBackend

        return EagerBackend()
    if name not in NAMES:
        raise OptionError(f"backend={name!r}: there is {', '.join(NAMES)}.", option="backend")
    from stitchcache.pieces.inductor import AotiBackend, InductorBackend

    return AotiBackend() if name == "aoti" else InductorBackend()
