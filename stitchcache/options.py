"""What users give beside a model: sizes and their ranges, secrets, CUDA graphs. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Literal

from stitchcache.errors import OptionError, check_kind
from stitchcache.records import Count, Name, dataclass

BACKENDS = ("aoti", "inductor", "eager")
COMPILER_OPTIONS = {"fallback_random": True}
"""Options that compiled pieces get unless the user says otherwise. Random ops draw eager's numbers under
eager's seed; Inductor's own generator is quicker and draws others."""


@dataclass(frozen=True, slots=True)
class SizeRange:
    """Sizes of a dynamic dimension that get code of their own, both ends included.

    Args:
        min: Smallest size.
        max: Largest size.
        dim: Name of the ``torch.export.Dim`` it is about; ``None`` where the model has only one.

    Raises:
        OptionError: ``min`` is below 0 or above ``max``.
    """

    min: Count
    max: Count
    dim: Name | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if type(self.min) is not int or type(self.max) is not int or not 0 <= self.min <= self.max:
            said = f"SizeRange({self.min!r}, {self.max!r}): needs whole numbers, 0 <= min <= max"
            raise OptionError(said, option="size_ranges")
        check_kind("SizeRange(dim=...)", self.dim, (str, type(None)), "the name of a Dim")

    def _flaw(self) -> tuple[str, str] | None:
        return ("max", f"{self.max} is below min {self.min}") if self.min > self.max else None

    def __lt__(self, other: SizeRange) -> bool:
        return (self.min, self.max) < (other.min, other.max)

    def __contains__(self, size: int) -> bool:
        return self.min <= size <= self.max

    def __str__(self) -> str:
        return str(self.min) if self.min == self.max else f"{self.min}..{self.max}"


@dataclass(frozen=True)
class Dim:
    """A size that may vary, for ``dynamic_shapes``; means what ``torch.export.Dim`` means.

    Making one of torch's imports sympy, a third of a second that a warm start has no use for. Use
    torch's where one dimension is derived from another (``2 * dim``).

    Args:
        name: A Python identifier; the same name is the same size.
        min: Smallest size.
        max: Largest size; ``None`` is unbounded.

    Raises:
        OptionError: The name is no identifier, or the range is empty.
    """

    name: str
    min: int = 0
    max: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise OptionError(f"Dim({self.name!r}): the name must be an identifier", option="dynamic_shapes")
        ends = [self.min, *(() if self.max is None else (self.max,))]
        if any(type(end) is not int for end in ends) or ends != sorted([0, *ends])[1:]:
            said = f"Dim({self.name!r}, {self.min!r}, {self.max!r}): needs whole numbers, 0 <= min <= max"
            raise OptionError(said, option="dynamic_shapes")

    @property
    def __name__(self) -> str:
        """The name, where torch's own dimensions have it."""
        return self.name


@dataclass(frozen=True)
class Secret:
    """A value for ``key_factors`` that counts in keys and is shown nowhere.

    Its digest is stored. Whoever can read the cache can try values, so it hides nothing that can be guessed.
    """

    value: object = field(repr=False)


@dataclass(frozen=True, slots=True)
class CudaGraphs:
    """Calls are recorded into CUDA graphs, and replayed: one launch instead of hundreds.

    The first call of a size runs as always, the second one is recorded, later ones are replayed. What has no
    graph runs without one. Graphs live in the process: they are part of no key and no entry.

    Args:
        sizes: Sizes of one dimension that get graphs; ``None`` for all that come. Without dynamic dimensions
            there is one graph, and nothing to say.
        mode: ``"pieces"`` leaves custom ops that stand between pieces outside, and records what is around
            them; ``"whole"`` records them too. What a recorded op does in Python happens once.
        dim: The dimension that ``sizes`` are about, such as ``"ids.shape[0]"``; ``None`` where only one may
            vary.
        inside: Custom ops that are recorded in mode ``"pieces"`` too, such as ``"mylib::attention"``.
        pad: Serve a smaller size by the graph of the next larger one, its inputs filled up with zeros. It is
            for you to know that the model gives the same then: that rows do not mix, and what they write.
        outputs: ``"copied"``, or ``"kept"``: results lie in memory of the graph, which the next call of that
            size writes into.
        at: ``"use"``, or ``"load"`` to record all sizes before ``compile`` returns, on the example enlarged.
        max_graphs: At most so many graphs.
        max_bytes: GPU memory that all graphs together may take; the one that goes beyond is dropped, and no
            more are recorded. ``None`` is unlimited.

    Raises:
        OptionError: A value makes no sense.
    """

    sizes: Sequence[int] | None = None
    mode: Literal["whole", "pieces"] = "pieces"
    dim: str | None = field(default=None, kw_only=True)
    inside: Sequence[str] = field(default=(), kw_only=True)
    pad: bool = field(default=False, kw_only=True)
    outputs: Literal["copied", "kept"] = field(default="copied", kw_only=True)
    at: Literal["use", "load"] = field(default="use", kw_only=True)
    max_graphs: int = field(default=64, kw_only=True)
    max_bytes: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        given = self.sizes if self.sizes is not None else ()
        known = {"mode": ("whole", "pieces"), "outputs": ("copied", "kept"), "at": ("use", "load")}
        wrong = [
            f"{name}={some!r}): needs a list"
            for name, some in (("inside", self.inside), ("sizes", given))
            if isinstance(some, str) or not isinstance(some, Sequence)
        ]
        for name, choices in (*known.items(), ("pad", (True, False))):
            if (value := getattr(self, name)) not in choices:
                wrong.append(f"{name}={value!r}): there is {', '.join(map(str, choices))}")
        if not wrong and any(type(size) is not int or size < 1 for size in given):
            wrong.append(f"sizes={self.sizes!r}): sizes are whole numbers from 1 on")
        if (self.pad or self.at == "load") and self.sizes is not None and not given:
            wrong.append("sizes=[]): to pad, or to record at load, it needs sizes")
        if self.pad and self.sizes is None:
            wrong.append("pad=True): needs sizes to pad to")
        if self.max_graphs < 1 or (self.max_bytes is not None and self.max_bytes < 1):
            wrong.append("max_graphs=..., max_bytes=...): need to be positive")
        if wrong:
            raise OptionError(f"CudaGraphs({wrong[0]}", option="cuda_graphs")
