"""The page of an entry: its stitching graph, bytes, contract, keys and code."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from contextlib import suppress

import msgpack

from stitchcache.cache import Cache
from stitchcache.html import Markup, facts, shown, table, tag
from stitchcache.report import entry as entries
from stitchcache.report.page import asset, page
from stitchcache.report.steps import UNREADABLE, Step, step_records, steps_of
from stitchcache.store import Area, Files, keyed_path
from stitchcache.store.sources import kept_sources
from stitchcache.types import Artifact, BlobRef, Variant
from stitchcache.words import count_text, moment_text, size_text

_MOST_BLOB = 64 << 20
_MOST_OPS = 64
_MOST_STEPS = 5000
_MOST_SOURCE = 400_000
_KERNEL = re.compile(
    rb"((?:cpp|triton_[a-z]{2,6})_fused_[A-Za-z0-9_]{1,200}(?=\0)|"
    rb"aoti_torch_(?:cpu|cuda|xpu|mps)_\w{1,80})(?:(\([^\0]{0,4000})|\0)"
)
"""Kernels that a compiled library names: loops that Inductor fused, and calls of torch's own."""


def entry_page(cache: Cache, entry: entries.Entry, profile: entries.Record | None = None) -> str:
    """One page that shows all that is known of an entry. Nothing of it is run, and torch is not imported.

    ``profile`` is what ``report.profile`` measured.
    """
    artifact = entry.artifact
    record = entries.entry_record(entry)
    pieces = entries.piece_records(artifact)
    for number, piece in enumerate(pieces):
        piece["letter"] = _letter(number)
        piece["ops"] = _ops(cache, piece)
    variants = [_variant(artifact, number, pieces) for number in range(len(artifact.variants))]
    spec = artifact.input_spec
    data = {
        "variants": [found[0] for found in variants],
        "pieces": [{**piece, "bytes": piece["blob"]["bytes"]} for piece in pieces],
        "weights": {binding.name: entries.binding_text(binding) for binding in artifact.bindings},
        "symbols": [[s.name, s.label, s.min, s.max] for s in spec.symbols] if spec is not None else [],
        # What takes bytes: label, bytes, and the number of the piece.
        "disk": [
            *[(f"piece {p['letter']}", p["blob"]["bytes"], at) for at, p in enumerate(pieces)],
            *[(f"constant {b.name}", b.blob.size, -1) for b in artifact.bindings if b.blob is not None],
            ("code, contract and keys", entry.file_bytes, -1),
        ],
        "profile": profile,
        "last": _last_start(cache, artifact),
    }
    title = artifact.label or artifact.graph_hash[:12]
    return page(
        f"{title} · stitchcache",
        tag("h1", title),
        tag("div", facts(entries.overview(entry)), class_="overview"),
        Markup(asset("drawing.html")),
        *_sections(artifact, record, pieces),
        tag("section", tag("h2", "Code", id="code"), *[found[1] for found in variants]),
        *_sources(cache, artifact, pieces),
        data=data,
    )


def _last_start(cache: Cache, artifact: Artifact) -> entries.Record:
    """When the last start was, as the cache counted it, and the seconds of its stages."""
    facts = cache.starts().get(artifact.graph_hash[:12], {})
    last = {name.removeprefix("last."): each for name, each in facts.items() if name.startswith("last.")}
    at, hits = min(last.pop("at", 0), 2**35), sum(n for name, n in facts.items() if name.startswith("hit."))
    stages = {name: microseconds / 1e6 for name, microseconds in last.items()}
    return {"said": f"{moment_text(at)}; {count_text(hits, 'hit')} counted so far", "stages": stages}


def _sources(cache: Cache, artifact: Artifact, pieces: list[entries.Record]) -> list[Markup]:
    """What the compiler generated, where it was kept, as far as a page should carry it."""
    kept = kept_sources(cache, artifact.graph_hash)
    files = [(piece, name, text) for piece in pieces for name, text in kept.get(piece["key"], {}).items()]
    found, room = [], _MOST_SOURCE
    for piece, name, text in files:
        if len(text) <= room:
            room -= len(text)
            code = tag("pre", tag("code", Markup("\n".join(map(shown, text.splitlines())))), tabindex="0")
            title = f"Piece {piece['letter']}: {name} ({size_text(len(text))})"
            found.append(tag("details", tag("summary", title), code))
        else:
            found.append(tag("p", f"Piece {piece['letter']}: {name} is long; 'inspect --source' shows it."))
    return [tag("section", tag("h2", "Generated source"), *found)] if found else []


def _letter(number: int) -> str:
    """``A`` to ``Z``, then ``AA`` and on."""
    return (_letter(number // 26 - 1) if number >= 26 else "") + chr(65 + number % 26)


def _variant(artifact: Artifact, number: int, pieces: list[entries.Record]) -> tuple[entries.Record, Markup]:
    """The data of a variant's drawing, and its code with links to the steps."""
    variant, spec = artifact.variants[number], artifact.input_spec
    title = f"sizes {variant.size_range or 'all'}"
    names = {name: at for at, piece in enumerate(pieces) for name in piece["calls"]}
    by_key = {piece["key"]: at for at, piece in enumerate(pieces)}
    names |= {piece.name: by_key[piece.key] for piece in variant.pieces}
    steps: list[Step] = []
    problem = ""
    try:
        steps = steps_of(variant)
    except UNREADABLE as error:
        problem = f"the code cannot be read: {error}"
    tensors = [leaf.tensor for leaf in spec.leaves if leaf.kind != "constant"] if spec is not None else []
    for step, tensor in zip((step for step in steps if step.kind == "input"), tensors, strict=False):
        step.said = "int" if tensor is None else f"{tensor.dtype}[{', '.join(map(str, tensor.shape))}]"
    if len(steps) > _MOST_STEPS:
        steps, problem = [], f"{len(steps)} steps are too many to be drawn"
    found = {"title": title, "problem": problem, "steps": step_records(steps, names)}
    begins = {step.first: at for at, step in enumerate(steps) if step.kind != "input"}
    lines = []
    for at, line in enumerate(variant.code.splitlines(), 1):
        kind, link = ("a", {"href": f"#v{number}s{begins[at]}"}) if at in begins else ("span", {})
        lines.append(tag(kind, line or " ", class_="line", id=f"v{number}L{at}", **link))
    heading = tag("h3", title) if variant.size_range else Markup()
    return found, Markup(heading + tag("pre", tag("code", *lines), tabindex="0"))


def _ops(cache: Cache, piece: entries.Record) -> list[tuple[str, int]]:
    """What a piece runs, each with how often it is called, as far as its file says."""
    data = _blob(cache, BlobRef(digest=piece["blob"]["digest"], size=piece["blob"]["bytes"]))
    if data is None:
        return []
    if piece["backend"] == "eager":
        try:
            record = msgpack.unpackb(data)
            code = record.get("code") if isinstance(record, dict) else None
            steps = steps_of(
                Variant(size_range=None, code=str(code), submod_names=(), consts=None, pieces=())
            )
        except (*UNREADABLE, msgpack.UnpackException):
            return []
        return Counter(step.name for step in steps if step.kind == "op").most_common(_MOST_OPS)
    # torch's runtime checks each call by its text, which stands once for each in the library.
    found = {(name, call) for name, call in _KERNEL.findall(data)}
    named = {name for name, _ in found}
    counted = Counter(name for name, call in found if call)
    kernels = Counter({n.decode().removeprefix("aoti_torch_"): max(1, counted[n]) for n in named})
    return kernels.most_common(_MOST_OPS)


def _blob(cache: Cache, ref: BlobRef) -> bytes | None:
    """A blob's bytes, whoever may write them; ``None`` where it is gone, damaged or too large."""
    for place in cache.paths:
        path = keyed_path(place, Area.BLOBS, ref.digest)
        # A pipe under its name is not waited for.
        with suppress(OSError), open(Files().open_read(path), "rb") as file:
            data = file.read(_MOST_BLOB)
            if hashlib.sha256(data).hexdigest() == ref.digest:
                return data
    return None


def _sections(artifact: Artifact, record: entries.Record, pieces: list[entries.Record]) -> list[Markup]:
    """What is read rather than looked at; long tables are folded."""
    rows = [
        (
            p["letter"],
            len(p["calls"]),
            p["backend"],
            size_text(p["blob"]["bytes"]),
            ", ".join(p["calls"][:4]) + (", …" if len(p["calls"]) > 4 else ""),
            tag("code", p["key"][:12]),
            ", ".join(f"{times} x {name}" if times > 1 else name for name, times in p["ops"][:12]),
        )
        for p in pieces
    ]
    consts = enumerate(text for variant in record["variants"] for text in variant["consts"])
    numbered = [(str(at), text) for at, text in consts]
    bindings = [(b.kind, b.name, entries.binding_text(b)) for b in artifact.bindings]
    factors = [(factor.name, factor.value) for factor in artifact.factors]
    titles = ("Piece", "Calls", "Backend", "Size", "Called as", "Key", "Runs")
    return [
        _section("Different pieces", table(titles, rows)),
        _section("Input", facts(entries.input_lines(artifact))),
        _section("Output", facts(entries.output_lines(artifact))),
        *([_section("Constants", facts(numbered))] if numbered else []),
        _folded("Tensors of the model", table(("Kind", "Name", "Tensor"), bindings), len(bindings)),
        _folded("Factors of its keys", facts(factors), len(factors)),
    ]


def _section(title: str, content: Markup) -> Markup:
    # Tables that scroll must be reached by the keyboard.
    inside = tag("div", content, class_="wide", tabindex="0", role="region", aria_label=title)
    return tag("section", tag("h2", title), inside)


def _folded(title: str, content: Markup, count: int) -> Markup:
    inside = tag("div", content, class_="wide")
    return tag("details", tag("summary", f"{shown(title)} ({count})"), inside)
