"""``stitchcache ls``, ``inspect`` and ``diff``: what entries hold, and what tells two apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stitchcache.cli.output import (
    Record,
    age_text,
    count_text,
    moment_text,
    on_terminal,
    open_cache,
    print_differences,
    print_heading,
    print_pairs,
    print_table,
    say,
    seconds_text,
    shared_options,
    short_length,
    show,
    size_text,
)
from stitchcache.errors import AmbiguousPrefixError, StitchCacheError
from stitchcache.explanation import names_text, printable
from stitchcache.types import SizeRange

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stitchcache.artifact.entry import Header
    from stitchcache.cache import Cache
    from stitchcache.report.entry import Entry
    from stitchcache.types import Artifact

_LISTED = ("GRAPH", "LABEL", "CREATED", "BACKEND", "CALLS", "BLOBS", "SIZE", "COMPILED IN", "FORMAT")
_ORDERS = {
    "created": lambda entry: -entry["created"],
    "size": lambda entry: -_size(entry),
    "label": lambda entry: (entry["label"], -entry["created"]),
}


# -- ls --------------------------------------------------------------------------------------------


@click.command()
@click.option("--sort", type=click.Choice(sorted(_ORDERS)), default="created", help="Order.")
@click.option("--wide", is_flag=True, help="Show graph hashes in full.")
@shared_options
def ls(sort: str, wide: bool, as_json: bool, root: str | None) -> None:
    """List the entries of a cache.

    CALLS counts the calls of compiled pieces, BLOBS the different files behind them. SIZE is the entry with
    its blobs; a blob that entries share is counted in each of them.
    """
    cache = open_cache(root)
    entries = sorted(map(_listed, cache.entries()), key=lambda entry: str(entry["graph_hash"]))
    entries.sort(key=_ORDERS[sort])
    show({"root": str(cache.root), "entries": entries}, as_json, lambda found: _print_list(found, wide))


def _listed(header: Header) -> Record:
    return {
        "graph_hash": header.graph_hash,
        "label": header.label,
        "created": header.created,
        "compile_seconds": header.compile_seconds,
        "format_version": header.format_version,
        "variants": header.variants,
        "pieces": header.pieces,
        "backends": list(header.backends),
        "blobs": [{"digest": blob.digest, "bytes": blob.size} for blob in header.blobs],
        "blob_bytes": header.blob_bytes,
        "entry_bytes": header.file_bytes,
        "path": header.path,
    }


def _size(entry: Record) -> int:
    return int(entry["entry_bytes"] + entry["blob_bytes"])


def _print_list(record: Record, wide: bool) -> None:
    entries = record["entries"]
    if not entries:
        say(f"no entries in {record['root']}")
        return
    length = 64 if wide else short_length(entry["graph_hash"] for entry in entries)
    rows = [
        [
            entry["graph_hash"][:length],
            entry["label"] or "-",
            age_text(entry["created"]),
            ",".join(entry["backends"]) or "-",
            entry["pieces"],
            len(entry["blobs"]),
            size_text(_size(entry)),
            seconds_text(entry["compile_seconds"]) if entry["compile_seconds"] else "-",
            entry["format_version"],
        ]
        for entry in entries
    ]
    print_table(_LISTED, rows)
    if on_terminal():
        blobs = {blob["digest"]: blob["bytes"] for entry in entries for blob in entry["blobs"]}
        size = size_text(sum(blobs.values()) + sum(entry["entry_bytes"] for entry in entries))
        click.echo(f"{count_text(len(entries), 'entry')}, {count_text(len(blobs), 'blob')}, {size}")


# -- inspect ---------------------------------------------------------------------------------------


@click.command()
@click.argument("prefix")
@click.option("--code", is_flag=True, help="Only the generated code.")
@click.option("--pieces", is_flag=True, help="Only the pieces, one line a call.")
@click.option("--bindings", is_flag=True, help="Only the tensors taken from the model.")
@click.option("--factors", is_flag=True, help="Only the named parts of its keys.")
@click.option("--wide", is_flag=True, help="Show keys and digests in full.")
@shared_options
def inspect(
    prefix: str,
    code: bool,
    pieces: bool,
    bindings: bool,
    factors: bool,
    wide: bool,
    as_json: bool,
    root: str | None,
) -> None:
    """Show what an entry holds; PREFIX is the beginning of its graph hash.

    Without an option: its header, what a call must bring, what it returns and the different pieces; the other
    parts have an option each. Entries of all formats can be shown. Nothing of the entry is run.
    """
    from stitchcache.report.entry import entry_record

    entry = _read(open_cache(root), prefix)
    width = 64 if wide else 12

    def view(record: Record) -> None:
        if not (code or pieces or bindings or factors):
            _print_overview(entry, width)
        if pieces:
            _print_pieces(record, width)
        if bindings:
            _print_bindings(entry.artifact)
        if factors:
            _print_factors(record, wide)
        if code:
            _print_code(entry.artifact)

    show(entry_record(entry), as_json, view)


def _read(cache: Cache, prefix: str) -> Entry:
    from stitchcache.report.entry import ambiguous, read_entry

    try:
        return read_entry(cache, prefix)
    except AmbiguousPrefixError as error:
        labels = {header.graph_hash: header.label for header in cache.entries()}
        candidates = {key: labels.get(key, "") for key in error.candidates}
        raise ambiguous(prefix, candidates, "graph hashes") from error


def _print_overview(entry: Entry, width: int) -> None:
    from stitchcache.report.entry import input_lines, output_lines, piece_records

    artifact = entry.artifact
    print_pairs(_header(entry))
    print_heading("Input")
    print_pairs(input_lines(artifact.input_spec), indent="  ")
    print_heading("Output")
    print_pairs(output_lines(artifact), indent="  ")
    if artifact.pieces:
        print_heading("Different pieces")
        rows = [
            [
                len(piece["calls"]),
                piece["key"][:width],
                piece["backend"],
                piece["blob"]["digest"][:width],
                size_text(piece["blob"]["bytes"]),
                names_text(piece["calls"]),
            ]
            for piece in piece_records(artifact)
        ]
        print_table(("CALLS", "KEY", "BACKEND", "BLOB", "SIZE", "CALLED AS"), rows)


def _header(entry: Entry) -> list[tuple[str, str]]:
    artifact = entry.artifact
    variants, pieces = artifact.variants, artifact.pieces
    torch = next((factor.value for factor in artifact.factors if factor.name == "env.torch"), "unknown")
    calls = f"{count_text(len(pieces), 'call')} of {len({piece.key for piece in pieces})} different"
    lines = count_text(sum(variant.code.count("\n") for variant in variants), "line")
    consts = [len(variant.consts) for variant in variants if variant.consts is not None]
    blobs = size_text(sum(blob.size for blob in artifact.blobs))
    return [
        ("graph hash", artifact.graph_hash),
        ("label", artifact.label or "-"),
        ("created", moment_text(artifact.created)),
        ("compiled in", seconds_text(artifact.compile_seconds) if artifact.compile_seconds else "unknown"),
        ("format", str(artifact.format_version)),
        ("backend", ", ".join(sorted({piece.backend for piece in pieces})) or "-"),
        ("torch", torch),
        ("pieces", calls if pieces else "0"),
        *([] if artifact.bindings else [("submodules", ", ".join(artifact.submod_names) or "none")]),
        ("bindings", count_text(len(artifact.bindings), "tensor") + " of the model"),
        ("factors", str(len(artifact.factors))),
        ("code", f"{lines} for {len(variants)} size ranges" if len(variants) > 1 else lines),
        ("constants", size_text(sum(consts)) if consts else "none"),
        ("size", f"{size_text(entry.file_bytes)} and {blobs} of blobs"),
        ("file", entry.path),
    ]


def _print_pieces(record: Record, width: int) -> None:
    ranged = len(record["variants"]) > 1
    titles = ["NAME", *(["SIZES"] if ranged else []), "KEY", "BACKEND", "BLOB", "BYTES", "SHARED BY"]
    rows = [
        [
            call["name"],
            *([str(SizeRange(**call["size_range"]))] if ranged else []),
            call["key"][:width],
            call["backend"],
            call["blob"][:width],
            call["bytes"],
            call["shared_by"],
        ]
        for call in record["pieces"]
    ]
    print_table(titles, rows)


def _print_bindings(artifact: Artifact) -> None:
    from stitchcache.report.entry import binding_text

    rows = [[binding.kind, binding.name, binding_text(binding)] for binding in artifact.bindings]
    print_table(("KIND", "NAME", "TENSOR"), rows)


def _print_factors(record: Record, wide: bool) -> None:
    names = ("name", "digest", "value") if wide else ("name", "value")
    titles = ("FACTOR", "DIGEST", "VALUE") if wide else ("FACTOR", "VALUE")
    print_table(titles, [[factor[name] for name in names] for factor in record["factors"]])


def _print_code(artifact: Artifact) -> None:
    for variant in artifact.variants:
        if len(artifact.variants) > 1:
            click.echo(f"# sizes: {variant.size_range or 'all'}")
        code = "\n".join(printable(line.replace("\t", "    ")) for line in variant.code.splitlines())
        if on_terminal():
            from rich.console import Console
            from rich.syntax import Syntax

            Console().print(Syntax(code, "python", background_color="default", word_wrap=True))
        else:
            click.echo(code)


# -- diff ------------------------------------------------------------------------------------------


@click.command()
@click.argument("a")
@click.argument("b")
@shared_options
def diff(a: str, b: str, as_json: bool, root: str | None) -> None:
    """Show what tells two entries apart; A and B are the beginnings of their graph hashes.

    Exit status 0 says that they are the same, 1 that they differ, 2 that they cannot be compared.
    """
    from stitchcache.cli.app import Misuse
    from stitchcache.report.entry import compare, read_entry

    cache = open_cache(root)
    try:
        one, two = read_entry(cache, a), read_entry(cache, b)
    except StitchCacheError as error:
        # As in diff(1): status 1 is kept for entries that were compared.
        raise Misuse(error.message) from error
    record = compare(one, two)
    show(record, as_json, _print_comparison, finding=not record["same"])


def _print_comparison(record: Record) -> None:
    for name in ("a", "b"):
        side = record[name]
        sizes = f"entry {size_text(side['entry_bytes'])}, blobs {size_text(side['blob_bytes'])}"
        print_pairs([(name.upper(), f"{side['graph_hash']}  {side['label'] or '-'}  {sizes}")])
    if record["same"]:
        click.echo("They are the same entry.")
        return
    pieces, parts = record["pieces"], ("factors", "contract", "code")
    if not (any(record[part] for part in parts) or pieces["only_a"] or pieces["only_b"]):
        click.echo("Nothing that is recorded in them differs.")
    for part in ("factors", "contract"):
        if record[part]:
            print_heading(part.capitalize())
            print_differences(record[part], ("NAME", "A", "B"))
    if record["code"]:
        print_heading("Code")
        for line in record["code"]:
            colour = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1])
            click.echo(click.style(printable(line.replace("\t", "    ")), fg=colour))
    print_heading("Pieces")
    rows = [
        _pieces_row("in both", pieces["shared"]),
        _pieces_row("only in A", pieces["only_a"]),
        _pieces_row("only in B", pieces["only_b"]),
    ]
    print_table(("WHERE", "DIFFERENT", "CALLS", "SIZE"), rows)


def _pieces_row(where: str, pieces: Sequence[Record]) -> list[object]:
    blobs = {piece["blob"]["digest"]: piece["blob"]["bytes"] for piece in pieces}
    calls = sum(len(piece["calls"]) for piece in pieces)
    return [where, len(pieces), calls, size_text(sum(blobs.values()))]
