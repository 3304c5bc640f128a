"""The traced road: capture, plan, and an artifact for what was planned."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from stitchcache.api.request import Request
from stitchcache.artifact.consts import dump_consts
from stitchcache.artifact.record import Artifact, Variant
from stitchcache.capture import Capture
from stitchcache.capture.contract import tensor_spec
from stitchcache.codegen import generate_execution_code
from stitchcache.graph.symbols import SymbolNames
from stitchcache.pieces import get_backend
from stitchcache.plan import Plan, plan
from stitchcache.types import BindingSpec, BlobRef, Factor, PieceRef, SizeRange


@dataclass(frozen=True, slots=True)
class Traced:
    """A captured and planned model.

    Args:
        capture: The capture that has the contract.
        plans: What has to be compiled, for each size range or for all sizes.
        builds: Each plan with its own capture.
        graph_hash: Names the entry.
        factors: What went into the graph hash beside the graph.
        bindings: Tensors that the stitching code uses, by name.
        constants: Tensors that the artifact carries.
    """

    capture: Capture
    plans: tuple[tuple[SizeRange | None, Plan], ...]
    builds: tuple[tuple[Plan, Capture], ...]
    graph_hash: str
    factors: tuple[Factor, ...]
    bindings: tuple[BindingSpec, ...]
    constants: Mapping[str, torch.Tensor]


def trace(
    model: torch.nn.Module,
    captured: Capture,
    variants: Sequence[tuple[SizeRange | None, Capture]],
    request: Request,
    environment: Sequence[Factor],
    *,
    entry_only: Sequence[Factor] = (),
) -> Traced:
    """Plan the compilation of a captured model.

    Args:
        model: The model.
        captured: The capture that has the contract.
        variants: A capture for each size range, or one for all sizes.
        request: Options.
        environment: Factors of the machine, torch's state and the options: all that compiled pieces
            depend on beside their graph.
        entry_only: Further factors that distinguish entries, but not the pieces in them.

    Raises:
        SplitError: The graph cannot be split as asked.
    """
    plans = tuple((size_range, _plan(variant, request, environment)) for size_range, variant in variants)
    bindings = _bindings(model, [variant for _, variant in variants], [planned for _, planned in plans])
    tensors = {item.name: item.tensor for item in captured.bound if item.kind == "constant"}
    carried = {b.name: tensors[b.name] for b in bindings if b.kind == "constant"}
    facts = (*_facts(captured, plans, bindings, carried), *entry_only)
    builds = tuple((planned, own) for (_, planned), (_, own) in zip(plans, variants, strict=True))
    return Traced(captured, plans, builds, _entry_hash(plans, facts, environment), facts, bindings, carried)


def _plan(captured: Capture, request: Request, environment: Sequence[Factor]) -> Plan:
    constants = [
        name
        for name, leaf in zip(captured.user_inputs, captured.input_spec.leaves, strict=True)
        if leaf.kind == "constant"
    ]
    return plan(
        captured.gm,
        {item.placeholder: (item.name, item.tensor) for item in captured.bound},
        constants,
        request.splitting_ops,
        get_backend(request.backend),
        get_backend("eager"),
        environment,
    )


def _bindings(
    model: torch.nn.Module, captures: Sequence[Capture], plans: Sequence[Plan]
) -> tuple[BindingSpec, ...]:
    """What the stitching code of any variant takes from the model."""
    used = {name for planned in plans for name in planned.attributes.values()}
    mutations = captures[0].output_spec.mutations
    written = {m.removeprefix("buffer:") for m in mutations if m.startswith("buffer:")}
    names: dict[int, list[str]] = {}
    for name, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        names.setdefault(id(tensor), []).append(name)
    found = []
    every = [item for captured in captures for item in captured.bound]
    tensors = {item.name: item for item in every}
    for item in tensors.values():
        if item.name in used | written:
            shared = names.get(id(item.tensor), []) if item.kind != "constant" else []
            paths = [path for other in every if other.name == item.name for path in other.aliases]
            found.append(
                BindingSpec(
                    name=item.name,
                    kind=item.kind,  # type: ignore[arg-type]
                    tensor=tensor_spec(item.tensor, SymbolNames(), item.name),
                    aliases=tuple(dict.fromkeys(n for n in [*shared, *paths] if n != item.name)),
                )
            )
    return tuple(found)


def _facts(
    captured: Capture,
    plans: Sequence[tuple[SizeRange | None, Plan]],
    bindings: Sequence[BindingSpec],
    carried: Mapping[str, torch.Tensor],
) -> tuple[Factor, ...]:
    """The parts of an entry beside its pieces."""
    structure = "\n".join(f"{size_range} {planned.structure}" for size_range, planned in plans)
    values = {name: dump_consts([tensor]) or b"" for name, tensor in carried.items()}
    return (
        fact("graph.structure", f"{len(plans)} variants", structure),
        fact("graph.inputs", f"{len(captured.input_spec.leaves)} leaves", repr(asdict(captured.input_spec))),
        fact("graph.outputs", f"{captured.output_spec.count} leaves", repr(asdict(captured.output_spec))),
        fact("graph.bindings", f"{len(bindings)} tensors", repr([asdict(b) for b in bindings])),
        fact("graph.constants", f"{len(carried)} tensors", repr(sorted(values.items()))),
    )


def fact(name: str, value: str, whole: str) -> Factor:
    """A factor with the digest of its whole value."""
    return Factor(name=name, value=value, digest=hashlib.sha256(whole.encode()).hexdigest())


def _entry_hash(
    plans: Sequence[tuple[SizeRange | None, Plan]], facts: Sequence[Factor], environment: Sequence[Factor]
) -> str:
    whole = hashlib.sha256(b"stitchcache entry 1\n")
    for size_range, planned in plans:
        whole.update(f"variant {size_range}\n".encode())
        for piece in planned.pieces:
            whole.update(f"piece {len(piece.name)} {piece.name} {piece.key}\n".encode())
    for factor in sorted([*facts, *environment], key=lambda f: f.name):
        whole.update(f"factor {len(factor.name)} {factor.name} {factor.digest}\n".encode())
    return whole.hexdigest()


def assemble(
    traced: Traced,
    blobs: Mapping[str, BlobRef],
    constants: Mapping[str, BlobRef],
    *,
    factors: Sequence[Factor],
    label: str,
    seconds: float,
) -> Artifact:
    """Write the stitching code and put an artifact together.

    Args:
        traced: What was planned.
        blobs: Piece key to stored piece.
        constants: Constant name to stored tensor.
        factors: Named parts of all keys, for explanations.
        label: What to call it in listings.
        seconds: What compiling took.

    Raises:
        CodegenError: A node of the stitching graph has no form as source.
    """
    variants = tuple(
        _variant(size_range, planned, traced.graph_hash, blobs) for size_range, planned in traced.plans
    )
    bindings = tuple(
        replace(b, blob=constants[b.name]) if b.kind == "constant" else b for b in traced.bindings
    )
    return Artifact(
        graph_hash=traced.graph_hash,
        variants=variants,
        input_spec=traced.capture.input_spec,
        output_spec=traced.capture.output_spec,
        bindings=bindings,
        factors=tuple(factors),
        created=time.time(),
        label=label,
        compile_seconds=seconds,
    )


def _variant(
    size_range: SizeRange | None, planned: Plan, graph_hash: str, blobs: Mapping[str, BlobRef]
) -> Variant:
    code, names, consts = generate_execution_code(
        planned.split_gm, boxed=[piece.name for piece in planned.pieces], graph_hash=graph_hash
    )
    return Variant(
        size_range=size_range,
        code=code,
        submod_names=tuple(names),
        consts=dump_consts(consts),
        pieces=tuple(
            PieceRef(name=p.name, key=p.key, backend=p.backend, blob=blobs[p.key]) for p in planned.pieces
        ),
    )


def stitched_leaves(captured: Capture) -> list[Any]:
    """The example's leaves that the stitching graph takes."""
    leaves, specs = captured.example, captured.input_spec.leaves
    return [leaf for leaf, spec in zip(leaves, specs, strict=True) if spec.kind != "constant"]
