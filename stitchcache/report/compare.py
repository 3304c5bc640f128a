"""What tells two entries apart."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from stitchcache.explanation import ABSENT, explain_differences
from stitchcache.report.entry import (
    DistinctPiece,
    Entry,
    binding_text,
    distinct_pieces,
    input_lines,
    output_lines,
)
from stitchcache.types import Artifact


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What tells an entry B from an entry A.

    Args:
        factors: Factor to ``(in A, in B)``.
        contract: Part of the contract, such as ``input ids``, to ``(in A, in B)``.
        code: The generated code as a unified diff; empty where it is the same.
        shared: Pieces that both have.
        only_a: Pieces that A has.
        only_b: Pieces that B has.
    """

    factors: Mapping[str, tuple[str, str]]
    contract: Mapping[str, tuple[str, str]]
    code: tuple[str, ...]
    shared: tuple[DistinctPiece, ...]
    only_a: tuple[DistinctPiece, ...]
    only_b: tuple[DistinctPiece, ...]

    @property
    def empty(self) -> bool:
        """Whether nothing that is recorded tells them apart."""
        return not (self.factors or self.contract or self.code or self.only_a or self.only_b)


def compare(a: Entry, b: Entry) -> Comparison:
    """Compare two entries of any formats."""
    one, two = a.artifact, b.artifact
    pieces_a = {found.piece.key: found for found in distinct_pieces(one)}
    pieces_b = {found.piece.key: found for found in distinct_pieces(two)}
    return Comparison(
        factors=explain_differences(one.factors, two.factors),
        contract=_differences(_contract(one), _contract(two)),
        code=tuple(
            difflib.unified_diff(
                _code(one), _code(two), one.graph_hash[:12], two.graph_hash[:12], lineterm=""
            )
        ),
        shared=tuple(found for key, found in pieces_a.items() if key in pieces_b),
        only_a=tuple(found for key, found in pieces_a.items() if key not in pieces_b),
        only_b=tuple(found for key, found in pieces_b.items() if key not in pieces_a),
    )


def _contract(artifact: Artifact) -> dict[str, str]:
    parts: dict[str, list[str]] = {}
    for name, text in input_lines(artifact.input_spec):
        parts.setdefault(f"input {name}".rstrip(), []).append(text)
    for name, text in output_lines(artifact):
        parts.setdefault(f"output {name}".rstrip(), []).append(text)
    for binding in artifact.bindings:
        parts.setdefault(f"{binding.kind} {binding.name}", []).append(binding_text(binding))
    return {name: "; ".join(texts) for name, texts in parts.items()}


def _differences(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    names = dict.fromkeys([*old, *new])
    pairs = {name: (old.get(name, ABSENT), new.get(name, ABSENT)) for name in names}
    return {name: (one, two) for name, (one, two) in pairs.items() if one != two}


def _code(artifact: Artifact) -> list[str]:
    lines = []
    for variant in artifact.variants:
        if len(artifact.variants) > 1:
            lines.append(f"# sizes: {variant.size_range or 'all'}")
        # Its own name stands in it, and would always differ.
        lines += variant.code.replace(artifact.graph_hash, "<graph hash>").splitlines()
    return lines
