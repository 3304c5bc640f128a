"""What an entry is: its plans, its tensors, its hash; and the artifact that is put together from them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from stitchcache.artifact.consts import dump_consts
from stitchcache.capture import Capture
from stitchcache.capture.contract import tensor_spec
from stitchcache.codegen.generate import generate_execution_code
from stitchcache.graph.symbols import SymbolNames
from stitchcache.keys.walk import plain_bytes
from stitchcache.pieces import get_backend
from stitchcache.pipeline.request import Request
from stitchcache.pipeline.source import Source, fact
from stitchcache.plan import Plan, plan
from stitchcache.types import Artifact, BindingSpec, BlobRef, Factor, PieceRef, SizeRange, Variant


@dataclass(frozen=True, slots=True)
class EntryPlan:
    """A captured model, planned: everything that its entry will be but the compiled pieces.

    Args:
        capture: The capture that has the contract.
        plans: What has to be compiled, for each size range or for all sizes.
        builds: Each plan with its own capture.
        graph_hash: Names the entry.
        factors: What went into the graph hash beside pieces and environment.
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


def plan_entry(source: Source, request: Request) -> EntryPlan:
    """Plan the compilation of a captured model.

    Args:
        source: What was captured.
        request: Options.

    Raises:
        SplitError: The graph cannot be split as asked.
    """
    environment, variants = source.environment, source.variants
    plans = tuple((size_range, _plan(variant, request, environment)) for size_range, variant in variants)
    bindings = _bindings(
        source.model, [variant for _, variant in variants], [planned for _, planned in plans]
    )
    tensors = {item.name: item.tensor for item in source.whole.bound if item.kind == "constant"}
    carried = {b.name: tensors[b.name] for b in bindings if b.kind == "constant"}
    facts = (*_facts(source.whole, plans, bindings, carried), *source.facts)
    return EntryPlan(
        capture=source.whole,
        plans=plans,
        builds=tuple((planned, own) for (_, planned), (_, own) in zip(plans, variants, strict=True)),
        graph_hash=_entry_hash(plans, facts, environment),
        factors=facts,
        bindings=bindings,
        constants=carried,
    )


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
    structure = plain_bytes([(_range(size_range), planned.structure) for size_range, planned in plans])
    values = {name: dump_consts([tensor]) or b"" for name, tensor in carried.items()}
    inputs, outputs = captured.input_spec, captured.output_spec
    return (
        fact("graph.structure", f"{len(plans)} variants", structure),
        fact(
            "graph.inputs",
            f"{len(inputs.leaves)} leaves",
            plain_bytes(asdict(inputs)),
        ),
        fact("graph.outputs", f"{outputs.count} leaves", plain_bytes(asdict(outputs))),
        fact("graph.bindings", f"{len(bindings)} tensors", plain_bytes([asdict(b) for b in bindings])),
        fact("graph.constants", f"{len(carried)} tensors", plain_bytes(sorted(values.items()))),
    )


def _entry_hash(
    plans: Sequence[tuple[SizeRange | None, Plan]], facts: Sequence[Factor], environment: Sequence[Factor]
) -> str:
    variants = [
        (_range(size_range), tuple((piece.name, piece.key) for piece in planned.pieces))
        for size_range, planned in plans
    ]
    factors = sorted((factor.name, factor.digest) for factor in [*facts, *environment])
    return hashlib.sha256(plain_bytes(("stitchcache entry 2", variants, factors))).hexdigest()


def _range(size_range: SizeRange | None) -> tuple[str | None, int, int] | None:
    """A range with its dimension, which its text leaves out."""
    return None if size_range is None else (size_range.dim, size_range.min, size_range.max)


def assemble(
    planned: EntryPlan,
    blobs: Mapping[str, BlobRef],
    constants: Mapping[str, BlobRef],
    *,
    known: Sequence[Factor],
    label: str,
    seconds: float,
) -> Artifact:
    """Write the stitching code and put an artifact together.

    Args:
        planned: What was planned.
        blobs: Piece key to stored piece.
        constants: Constant name to stored tensor.
        known: Further factors of the source, to explain and to compare with later.
        label: What to call it in listings.
        seconds: What compiling took.

    Raises:
        CodegenError: A node of the stitching graph has no form as source.
    """
    variants = tuple(
        _variant(size_range, one, planned.graph_hash, blobs) for size_range, one in planned.plans
    )
    bindings = tuple(
        replace(b, blob=constants[b.name]) if b.kind == "constant" else b for b in planned.bindings
    )
    return Artifact(
        graph_hash=planned.graph_hash,
        variants=variants,
        input_spec=planned.capture.input_spec,
        output_spec=planned.capture.output_spec,
        bindings=bindings,
        # One factor a name, the last of each.
        factors=tuple({factor.name: factor for factor in (*known, *planned.factors)}.values()),
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
