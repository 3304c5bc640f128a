"""Functions of sizes that torch adds to sympy. Uses ``torch.utils._sympy``."""

from __future__ import annotations

from torch.utils._sympy.functions import CleanDiv, FloorDiv, Mod, PythonMod
from torch.utils._sympy.numbers import IntInfinity

__all__ = ["CleanDiv", "FloorDiv", "IntInfinity", "Mod", "PythonMod"]

SEEN = ("2.11", "2.13")
