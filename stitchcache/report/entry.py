"""Entries and keys to look at: read from their files, told as JSON records and in words. Nothing is run."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from stitchcache import explanation, types
from stitchcache.artifact.entry import OUTSIDE, decode_named, signature_in, unpack_factors
from stitchcache.cache import Cache
from stitchcache.errors import AmbiguousPrefixError, EntryFormatError, GraphHashError, StoreError, printable
from stitchcache.options import SizeRange
from stitchcache.records import dataclass
from stitchcache.store import Area, Files, keyed_path, possible_paths
from stitchcache.store.root import Root
from stitchcache.words import count_text, moment_text, seconds_text, size_text

Record = dict[str, Any]
"""A report as ``--json`` prints it."""

_MOST_TEXT = 2000
_MOST_NEAR = 3


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry with the file it came from, and the file's length."""

    artifact: types.Artifact
    path: str
    file_bytes: int
    signature: bytes
    imported: bool  # whether its signature was made elsewhere


def read_entry(cache: Cache, prefix: str) -> Entry:
    """Read the entry that a prefix means, of any format and whoever may write its file.

    Raises a GraphHashError if there is none, an EntryFormatError if it is damaged or of a newer format, and a
    StoreError if its file cannot be read.
    """
    try:
        graph_hash = cache.find(prefix)
    except AmbiguousPrefixError as error:
        labels = {header.graph_hash: header.label for header in cache.entries()}
        candidates = {key: labels.get(key, "") for key in error.candidates}
        raise _ambiguous(prefix, candidates, "graph hashes") from error
    for root in cache.paths:
        for path in possible_paths(root, Area.ENTRIES, graph_hash):
            if (data := entry_bytes(path)) is not None:
                signature = signature_in(data)
                artifact, imported = decode_named(data, graph_hash, path), signature.startswith(OUTSIDE)
                return Entry(artifact, path, len(data), signature.removeprefix(OUTSIDE), imported)
    raise GraphHashError(f"entry {graph_hash[:12]} was removed from {cache.root} just now", prefix=prefix)


def entry_bytes(path: str) -> bytes | None:
    """The bytes of an entry's file, whoever may write it; ``None`` where it is gone."""
    try:
        # A pipe under its name must not be waited for, nor a huge file be read.
        found = Root("", files=Files(), durable=False, read_only=True).read(path, Area.ENTRIES)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StoreError(f"{path}: cannot be read ({reason}); check its owner and mode", path=path) from error
    return None if found is None else found[0]


def summary(entry: Entry) -> Record:
    """What an entry is, without its parts."""
    artifact = entry.artifact
    return {
        **_fields(artifact, "graph_hash", "label", "created", "compile_seconds", "format_version"),
        "path": entry.path,
        "entry_bytes": entry.file_bytes,
        "blob_bytes": sum(blob.size for blob in artifact.blobs),
        "code_lines": sum(variant.code.count("\n") for variant in artifact.variants),
    }


def overview(entry: Entry) -> list[tuple[str, str]]:
    """The same as names and values."""
    artifact, known = entry.artifact, summary(entry)
    factors = {factor.name: factor.value for factor in artifact.factors}
    check, different = artifact.check, len({piece.key for piece in artifact.pieces})
    sizes = [] if artifact.variants[0].size_range is None else [str(v.size_range) for v in artifact.variants]
    pairs = [
        ("graph hash", artifact.graph_hash),
        ("label", artifact.label),
        ("created", moment_text(artifact.created)),
        ("compiled in", seconds_text(artifact.compile_seconds) if artifact.compile_seconds else ""),
        ("format", str(artifact.format_version)),
        ("backend", ", ".join(sorted({piece.backend for piece in artifact.pieces}))),
        ("torch", factors.get("env.torch", "")),
        ("pieces", f"{count_text(len(artifact.pieces), 'call')} of {different} different"),
        ("submodules", "" if artifact.bindings else ", ".join(artifact.submod_names)),
        ("bindings", f"{count_text(len(artifact.bindings), 'tensor')} of the model"),
        ("factors", str(len(factors))),
        ("code", count_text(known["code_lines"], "line")),
        ("size ranges", ", ".join(sizes)),
        ("constants", size_text(sum(len(variant.consts or b"") for variant in artifact.variants))),
        ("size", f"{size_text(entry.file_bytes)} and {size_text(known['blob_bytes'])} of blobs"),
        ("compared", "; ".join(filter(None, (check.state, check.reason))) if check is not None else ""),
        ("file", entry.path),
    ]
    return [(name, text) for name, text in pairs if text]


def entry_record(entry: Entry) -> Record:
    """Everything that is known of an entry."""
    # Not at the top: it imports what reads pickles, and keys are explained without.
    from stitchcache.report.constants import shown_consts

    artifact = entry.artifact
    calls = Counter(piece.blob.digest for piece in artifact.pieces)
    return {
        **summary(entry),
        "backends": sorted({piece.backend for piece in artifact.pieces}),
        "input": _dict(artifact.input_spec),
        "output": _dict(artifact.output_spec),
        "pieces": [
            # Each with the number of calls that run the same blob.
            {
                **_fields(piece, "name", "key", "backend"),
                "blob": piece.blob.digest,
                "bytes": piece.blob.size,
                "size_range": _dict(variant.size_range),
                "shared_by": calls[piece.blob.digest],
            }
            for variant in artifact.variants
            for piece in variant.pieces
        ],
        "bindings": [asdict(binding) for binding in artifact.bindings],
        "factors": [asdict(factor) for factor in artifact.factors],
        "variants": [
            {
                "size_range": _dict(variant.size_range),
                "code": variant.code,
                "submod_names": list(variant.submod_names),
                "consts_bytes": None if variant.consts is None else len(variant.consts),
                "consts": shown_consts(variant.consts),
            }
            for variant in artifact.variants
        ],
    }


def _fields(record: object, *names: str) -> Record:
    return {name: getattr(record, name) for name in names}


def _dict(part: types.InputSpec | types.OutputSpec | SizeRange | None) -> Record | None:
    return None if part is None else asdict(part)


def piece_records(artifact: types.Artifact) -> list[Record]:
    """The different pieces in order of first use, each with the names of its calls."""
    found: dict[str, Record] = {}
    for piece in artifact.pieces:
        blob = {"digest": piece.blob.digest, "bytes": piece.blob.size}
        first = {"key": piece.key, "backend": piece.backend, "calls": [], "blob": blob}
        found.setdefault(piece.key, first)["calls"].append(piece.name)
    return list(found.values())


def gil_words(cache: Cache, artifact: types.Artifact) -> dict[str, str]:
    """What each different piece does with the GIL while it runs, by its key: ``let go`` or ``kept``.

    Pieces that run op by op leave it to torch's ops. A blob that is not in the cache tells nothing.
    """
    found = {}
    for piece in artifact.pieces:
        if piece.backend != "aoti":
            found[piece.key] = "by op" if piece.backend == "eager" else "kept"
            continue
        for root in cache.paths:
            path = keyed_path(root, Area.BLOBS, piece.blob.digest)
            with suppress(OSError), open(Files().open_read(path), "rb") as file:
                file.seek(-len(types.CALLER_MARK), os.SEEK_END)
                found[piece.key] = "let go" if file.read() == types.CALLER_MARK else "kept"
                break
    return found


def compare(a: Entry, b: Entry) -> Record:
    """What tells an entry B from an entry A, of any formats."""
    import difflib

    one, two = a.artifact, b.artifact
    pieces_a, pieces_b = piece_records(one), piece_records(two)
    keys_a, keys_b = ({piece["key"] for piece in pieces} for pieces in (pieces_a, pieces_b))
    parts_a, parts_b = _contract(one), _contract(two)
    pairs = {
        name: (parts_a.get(name, explanation.ABSENT), parts_b.get(name, explanation.ABSENT))
        for name in parts_a | parts_b
    }
    names = (one.graph_hash[:12], two.graph_hash[:12])
    return {
        "same": one.graph_hash == two.graph_hash,
        "a": summary(a),
        "b": summary(b),
        "factors": difference_records(explanation.explain_differences(one.factors, two.factors)),
        "contract": difference_records({name: pair for name, pair in pairs.items() if pair[0] != pair[1]}),
        "code": list(difflib.unified_diff(_code(one), _code(two), *names, lineterm="")),
        "pieces": {
            "shared": [piece for piece in pieces_a if piece["key"] in keys_b],
            "only_a": [piece for piece in pieces_a if piece["key"] not in keys_b],
            "only_b": [piece for piece in pieces_b if piece["key"] not in keys_a],
        },
    }


def difference_records(differences: Mapping[str, tuple[str, str]]) -> list[Record]:
    """Differences as JSON has them."""
    return [{"name": name, "old": old, "new": new} for name, (old, new) in differences.items()]


def _contract(artifact: types.Artifact) -> dict[str, str]:
    parts: dict[str, str] = {}
    for name, text in (
        *((f"input {name}".rstrip(), text) for name, text in input_lines(artifact)),
        *((f"output {name}".rstrip(), text) for name, text in output_lines(artifact)),
        *((f"{binding.kind} {binding.name}", binding_text(binding)) for binding in artifact.bindings),
    ):
        parts[name] = f"{parts[name]}; {text}" if name in parts else text
    return parts


def _code(artifact: types.Artifact) -> list[str]:
    lines = []
    for variant in artifact.variants:
        if len(artifact.variants) > 1:
            lines.append(f"# sizes: {variant.size_range or 'all'}")
        # Its own name stands in it, and would always differ.
        lines += variant.code.replace(artifact.graph_hash, "<graph hash>").splitlines()
    return lines


def explain_key(cache: Cache, prefix: str) -> Record:
    """What the beginning of a graph hash or target key stands for, as ``explain --json`` prints it.

    Raises as :func:`read_entry` does; a target may lead to an entry that is gone or damaged.
    """
    kind, key = _named(cache, prefix)
    targets = explanation.stored_targets(cache.paths, **{"prefix" if kind == "target" else "graph_hash": key})
    packed, path = next(((r.factors, path) for _, path, r in targets if r.factors), (b"", ""))
    # A target's factors can be compared with those of other targets, an entry's only with entries'.
    compared = unpack_factors(packed, path=path) if packed else ()
    entry, problem = None, ""
    try:
        entry = read_entry(cache, targets[0][2].graph_hash if kind == "target" else key)
    except (GraphHashError, EntryFormatError) as error:
        if kind == "entry":
            raise
        problem = error.message
    factors = compared
    if kind == "entry" and entry is not None:
        factors = entry.artifact.factors
        compared = tuple(f for f in compared or factors if not f.name.startswith("graph."))
    label = entry.artifact.label if entry is not None else targets[0][2].label
    facts = {} if entry is None else summary(entry)
    near = explanation.nearest_entries(cache.paths, compared, label=label, most=_MOST_NEAR, without={key})
    graph_hash = key if kind == "entry" else targets[0][2].graph_hash
    # Calls that did not fit and that a model served itself, by argument.
    counted, misfits = cache.counted(), f"mismatch.{graph_hash[:12]}."
    return {
        "kind": kind,
        "key": key,
        "graph_hash": graph_hash,
        "mismatches": {
            n.removeprefix(misfits): count for n, count in counted.items() if n.startswith(misfits)
        },
        **{name: facts.get(name) for name in ("label", "created", "path")},
        "problem": problem,
        "targets": [_target_record(*target) for target in targets],
        "factors": [asdict(factor) for factor in factors],
        "nearest": near_records(near) if compared else [],
    }


def _named(cache: Cache, prefix: str) -> tuple[str, str]:
    """What the beginning of a key names: ``entry`` or ``target``, and the whole key."""
    try:
        entries = [cache.find(prefix)]
    except AmbiguousPrefixError as error:
        entries = list(error.candidates)
    except GraphHashError:
        entries = []
    targets = explanation.stored_targets(cache.paths, prefix=prefix.lower())
    labels = dict.fromkeys(entries, "entry") | {key: f"target of {r.label}" for key, _, r in targets}
    if not labels:
        raise GraphHashError(f"no entry and no target in {cache.root} begins with {prefix}", prefix=prefix)
    if len(labels) > 1:
        raise _ambiguous(prefix, labels, "keys")
    return ("target" if targets else "entry"), next(iter(labels))


def _ambiguous(prefix: str, labels: Mapping[str, str], kind: str) -> AmbiguousPrefixError:
    """The error for a prefix of several keys, with what each of them is."""
    lines = [f"  {key}  {printable(label)}".rstrip() for key, label in labels.items()]
    message = f"{prefix} is the beginning of {len(lines)} {kind}; give more digits:"
    return AmbiguousPrefixError("\n".join([message, *lines]), prefix=prefix, candidates=list(labels))


def near_records(nearest: Iterable[explanation.NearestEntry]) -> list[Record]:
    """The nearest entries as JSON has them."""
    names = ("graph_hash", "target_key", "label", "created", "refused")
    return [{**_fields(n, *names), "differences": difference_records(n.differences)} for n in nearest]


def _target_record(key: str, path: str, record: types.TargetRecord) -> Record:
    return {
        "target_key": key,
        **_fields(record, "graph_hash", "label", "created", "refused"),
        "sources": [{"module": s.module, "bytes": s.size, "digest": s.digest} for s in record.sources],
        "globals": [{"name": name, "digest": digest} for name, digest in record.globals],
        "path": path,
    }


def tensor_text(tensor: types.TensorSpec) -> str:
    """A tensor such as ``float32[s0, 384] cpu``; strides are told where they are not the usual ones."""
    shape = ", ".join(str(size) for size in tensor.shape)
    text = f"{tensor.dtype}[{shape}] {tensor.device}"
    if tensor.stride != types.row_major(tensor.shape):
        text += f" strides ({', '.join(str(size) for size in tensor.stride)})"
    return text


def input_lines(artifact: types.Artifact) -> list[tuple[str, str]]:
    """The input contract as names and values: arguments, ranges of symbols, further constraints."""
    spec, narrowed = artifact.input_spec, artifact.narrowed
    if spec is None:
        return [("", "not recorded: made through the engine API")]
    lines = []
    for leaf in spec.leaves:
        text = f"int {leaf.symbol}" if leaf.kind == "symbol" else f"must be {leaf.value!r}"
        lines.append((leaf.path, text if leaf.tensor is None else tensor_text(leaf.tensor)))
    for symbol in spec.symbols:
        text = f"{symbol.min} and more" if symbol.max is None else f"{symbol.min}..{symbol.max}"
        text = f"{text} ({symbol.label})" if symbol.label else text
        lines.append((symbol.name, f"{text}; {narrowed[symbol.name]}" if symbol.name in narrowed else text))
    lines += [("must hold", constraint) for constraint in spec.constraints]
    return lines or [("", "no arguments")]


def output_lines(artifact: types.Artifact) -> list[tuple[str, str]]:
    """What a call returns, and what it writes to, as names and values."""
    spec = artifact.output_spec
    if spec is None:
        return [("", "not recorded: made through the engine API")]
    lines = [("returns", tree_text(spec.tree))]
    leaves = artifact.input_spec.leaves if artifact.input_spec is not None else ()
    for mutation in spec.mutations:
        kind, _, what = mutation.partition(":")
        if kind == "input" and what.isdigit() and int(what) < len(leaves):
            what = leaves[int(what)].path
        lines.append(("writes to", f"{kind} {what}"))
    return lines


def binding_text(binding: types.BindingSpec) -> str:
    """What a bound tensor must be."""
    text = tensor_text(binding.tensor)
    return f"{text} (the same tensor as {', '.join(binding.aliases)})" if binding.aliases else text


def tree_text(tree: str) -> str:
    """A structure, as ``stitchcache.tree.dumps`` writes it, such as ``(*, {'mask': *})``.

    One of a kind unknown here is shown as it is.
    """
    try:
        _version, spec = json.loads(tree)
        return _node(spec)[:_MOST_TEXT]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return tree[:_MOST_TEXT]


def _node(spec: Record) -> str:
    kind = spec["type"]
    if kind is None:
        return "*"
    children = [_node(child) for child in spec["children_spec"]]
    context, name = spec["context"], kind.rpartition(".")[2]
    if kind == "builtins.tuple":
        return f"({', '.join(children)}{',' if len(children) == 1 else ''})"
    if kind == "builtins.list":
        return f"[{', '.join(children)}]"
    if kind == "collections.namedtuple":
        return f"{context.rpartition('.')[2]}({', '.join(children)})"
    keys = json.loads(context) if isinstance(context, str) else None
    if isinstance(keys, list) and len(keys) == len(children):
        fields = ", ".join(f"{key!r}: {child}" for key, child in zip(keys, children, strict=True))
        return f"{{{fields}}}" if kind == "builtins.dict" else f"{name}({{{fields}}})"
    return f"{name}({', '.join(children)})"
