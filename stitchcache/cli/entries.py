"""``stitchcache ls``, ``inspect`` and ``diff``: what entries hold, and what tells two apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from stitchcache.cli.output import (
    Column,
    age_text,
    cache_option,
    count_text,
    difference_records,
    finding,
    json_option,
    moment_text,
    on_terminal,
    open_cache,
    print_differences,
    print_heading,
    print_json,
    print_pairs,
    print_table,
    printable,
    seconds_text,
    short_length,
    size_text,
)
from stitchcache.errors import AmbiguousPrefixError, StitchCacheError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stitchcache.artifact.entry import Header
    from stitchcache.cache import Cache
    from stitchcache.report.compare import Comparison
    from stitchcache.report.entry import DistinctPiece, Entry
    from stitchcache.types import Artifact

_KEY = 12
_LISTED = (
    Column("GRAPH"),
    Column("LABEL", flexible=True),
    Column("CREATED"),
    Column("BACKEND"),
    Column("CALLS", right=True),
    Column("BLOBS", right=True),
    Column("SIZE", right=True),
    Column("COMPILED IN", right=True),
    Column("FORMAT", right=True),
)
_ORDERS = {
    "created": lambda header: (-header.created, header.graph_hash),
    "size": lambda header: (-_size(header), header.graph_hash),
    "label": lambda header: (header.label, -header.created, header.graph_hash),
}


@click.command()
@click.option("--sort", type=click.Choice(sorted(_ORDERS)), default="created", help="Order.")
@click.option("--wide", is_flag=True, help="Show graph hashes in full.")
@json_option
@cache_option
def ls(sort: str, wide: bool, as_json: bool, root: str | None) -> None:
    """List the entries of a cache.

    CALLS counts the calls of compiled pieces, BLOBS the different files behind them. SIZE is the entry with
    its blobs; a blob that entries share is counted in each of them.
    """
    cache = open_cache(root)
    headers = sorted(cache.entries(), key=_ORDERS[sort])
    if as_json:
        print_json({"root": str(cache.root), "entries": [_listed(header) for header in headers]})
        return
    if not headers:
        click.echo(f"no entries in {cache.root}", err=True)
        return
    length = 64 if wide else short_length(header.graph_hash for header in headers)
    print_table(_LISTED, [_listed_row(header, length) for header in headers])
    if on_terminal():
        click.echo(_summary(headers))


def _size(header: Header) -> int:
    return header.file_bytes + header.blob_bytes


def _listed_row(header: Header, length: int) -> list[str]:
    return [
        header.graph_hash[:length],
        header.label or "-",
        age_text(header.created),
        ",".join(header.backends) or "-",
        str(header.pieces),
        str(len(header.blobs)),
        size_text(_size(header)),
        seconds_text(header.compile_seconds) if header.compile_seconds else "-",
        str(header.format_version),
    ]


def _listed(header: Header) -> dict[str, Any]:
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


def _summary(headers: list[Header]) -> str:
    blobs = {blob.digest: blob.size for header in headers for blob in header.blobs}
    size = sum(blobs.values()) + sum(header.file_bytes for header in headers)
    entries = count_text(len(headers), "entry")
    return f"{entries}, {count_text(len(blobs), 'blob')}, {size_text(size)}"


@click.command()
@click.argument("prefix")
@click.option("--code", is_flag=True, help="Only the generated code.")
@click.option("--pieces", is_flag=True, help="Only the pieces, one line a call.")
@click.option("--bindings", is_flag=True, help="Only the tensors taken from the model.")
@click.option("--factors", is_flag=True, help="Only the named parts of its keys.")
@click.option("--wide", is_flag=True, help="Show keys and digests in full.")
@json_option
@cache_option
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
    entry = _read(open_cache(root), prefix)
    if as_json:
        from stitchcache.report.entry import entry_record

        print_json(entry_record(entry))
        return
    artifact, width = entry.artifact, 64 if wide else _KEY
    if not (code or pieces or bindings or factors):
        _overview(entry, width)
    if pieces:
        _print_pieces(artifact, width)
    if bindings:
        _print_bindings(artifact)
    if factors:
        _print_factors(artifact, wide)
    if code:
        _print_code(artifact)


def _read(cache: Cache, prefix: str) -> Entry:
    from stitchcache.report.entry import read_entry

    try:
        return read_entry(cache, prefix)
    except AmbiguousPrefixError as error:
        labels = {header.graph_hash: header.label for header in cache.entries()}
        lines = [f"  {key}  {printable(labels.get(key, ''))}".rstrip() for key in error.candidates]
        message = f"{prefix} is the beginning of {len(lines)} graph hashes; give more digits:"
        raise AmbiguousPrefixError(
            "\n".join([message, *lines]), prefix=prefix, candidates=error.candidates
        ) from error


def _overview(entry: Entry, width: int) -> None:
    from stitchcache.report.entry import distinct_pieces, input_lines, names_text, output_lines

    artifact = entry.artifact
    print_pairs(_header(entry))
    print_heading("Input")
    print_pairs(input_lines(artifact.input_spec), indent="  ")
    print_heading("Output")
    print_pairs(output_lines(artifact), indent="  ")
    if artifact.pieces:
        print_heading("Different pieces")
        columns = (
            Column("CALLS", right=True),
            Column("KEY"),
            Column("BACKEND"),
            Column("BLOB"),
            Column("SIZE", right=True),
            Column("CALLED AS", flexible=True),
        )
        rows = [
            [
                str(len(found.names)),
                found.piece.key[:width],
                found.piece.backend,
                found.piece.blob.digest[:width],
                size_text(found.piece.blob.size),
                names_text(found.names),
            ]
            for found in distinct_pieces(artifact)
        ]
        print_table(columns, rows)


def _header(entry: Entry) -> list[tuple[str, str]]:
    artifact = entry.artifact
    factors = {factor.name: factor.value for factor in artifact.factors}
    distinct = len({piece.key for piece in artifact.pieces})
    backends = ", ".join(sorted({piece.backend for piece in artifact.pieces}))
    lines = sum(variant.code.count("\n") for variant in artifact.variants)
    return [
        ("graph hash", artifact.graph_hash),
        ("label", artifact.label or "-"),
        ("created", moment_text(artifact.created)),
        ("compiled in", seconds_text(artifact.compile_seconds) if artifact.compile_seconds else "unknown"),
        ("format", str(artifact.format_version)),
        ("backend", backends or "-"),
        ("torch", factors.get("env.torch", "unknown")),
        (
            "pieces",
            f"{count_text(len(artifact.pieces), 'call')} of {distinct} different" if distinct else "0",
        ),
        *([] if artifact.bindings else [("submodules", ", ".join(artifact.submod_names) or "none")]),
        ("bindings", count_text(len(artifact.bindings), "tensor") + " of the model"),
        ("factors", str(len(artifact.factors))),
        ("code", count_text(lines, "line") + _variants(artifact)),
        ("constants", _constants(artifact)),
        ("size", f"{size_text(entry.file_bytes)} and {size_text(_blob_bytes(artifact))} of blobs"),
        ("file", entry.path),
    ]


def _variants(artifact: Artifact) -> str:
    return f" for {len(artifact.variants)} size ranges" if len(artifact.variants) > 1 else ""


def _constants(artifact: Artifact) -> str:
    sizes = [len(variant.consts) for variant in artifact.variants if variant.consts is not None]
    return size_text(sum(sizes)) if sizes else "none"


def _blob_bytes(artifact: Artifact) -> int:
    return sum(blob.size for blob in artifact.blobs)


def _print_pieces(artifact: Artifact, width: int) -> None:
    from stitchcache.report.entry import piece_rows

    ranged = len(artifact.variants) > 1
    columns = [
        Column("NAME"),
        *([Column("SIZES")] if ranged else []),
        Column("KEY"),
        Column("BACKEND"),
        Column("BLOB"),
        Column("BYTES", right=True),
        Column("SHARED BY", right=True),
    ]
    rows = [
        [
            row.piece.name,
            *([str(row.size_range or "all")] if ranged else []),
            row.piece.key[:width],
            row.piece.backend,
            row.piece.blob.digest[:width],
            str(row.piece.blob.size),
            str(row.shared),
        ]
        for row in piece_rows(artifact)
    ]
    print_table(columns, rows)


def _print_bindings(artifact: Artifact) -> None:
    from stitchcache.report.entry import binding_text

    columns = (Column("KIND"), Column("NAME", flexible=True), Column("TENSOR", flexible=True))
    print_table(columns, [[b.kind, b.name, binding_text(b)] for b in artifact.bindings])


def _print_factors(artifact: Artifact, wide: bool) -> None:
    columns = [
        Column("FACTOR", flexible=True),
        *([Column("DIGEST")] if wide else []),
        Column("VALUE", flexible=True),
    ]
    rows = [[f.name, *([f.digest] if wide else []), f.value] for f in artifact.factors]
    print_table(columns, rows)


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


@click.command()
@click.argument("a")
@click.argument("b")
@json_option
@cache_option
def diff(a: str, b: str, as_json: bool, root: str | None) -> None:
    """Show what tells two entries apart; A and B are the beginnings of their graph hashes.

    Exit status 0 says that they are the same, 1 that they differ, 2 that they cannot be compared.
    """
    from stitchcache.cli.app import Misuse
    from stitchcache.report.compare import compare
    from stitchcache.report.entry import read_entry

    cache = open_cache(root)
    try:
        one, two = read_entry(cache, a), read_entry(cache, b)
    except StitchCacheError as error:
        # As diff does it: 1 is kept for entries that were compared.
        raise Misuse(error.message) from error
    found = compare(one, two)
    same = one.artifact.graph_hash == two.artifact.graph_hash
    if as_json:
        print_json({"same": same, "a": _side(one), "b": _side(two), **_compared(found)})
    else:
        _print_comparison(one, two, found, same)
    if not same:
        finding()


def _print_comparison(one: Entry, two: Entry, found: Comparison, same: bool) -> None:
    for name, entry in (("A", one), ("B", two)):
        side = _side(entry)
        sizes = f"entry {size_text(side['entry_bytes'])}, blobs {size_text(side['blob_bytes'])}"
        print_pairs([(name, f"{side['graph_hash']}  {side['label'] or '-'}  {sizes}")])
    if same:
        click.echo("They are the same entry.")
        return
    if found.empty:
        click.echo("Nothing that is recorded in them differs.")
    for title, differences in (("Factors", found.factors), ("Contract", found.contract)):
        if differences:
            print_heading(title)
            print_differences(differences.items(), "NAME", "A", "B")
    if found.code:
        print_heading("Code")
        for line in found.code:
            click.echo(_coloured(printable(line.replace("\t", "    "))))
    print_heading("Pieces")
    rows = [
        [where, str(len(pieces)), str(_calls(pieces)), size_text(_bytes(pieces))]
        for where, pieces in (
            ("in both", found.shared),
            ("only in A", found.only_a),
            ("only in B", found.only_b),
        )
    ]
    columns = (
        Column("WHERE"),
        Column("DIFFERENT", right=True),
        Column("CALLS", right=True),
        Column("SIZE", right=True),
    )
    print_table(columns, rows)


def _coloured(line: str) -> str:
    colour = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1])
    return click.style(line, fg=colour) if colour else line


def _calls(pieces: Sequence[DistinctPiece]) -> int:
    return sum(len(piece.names) for piece in pieces)


def _bytes(pieces: Sequence[DistinctPiece]) -> int:
    return sum({found.piece.blob.digest: found.piece.blob.size for found in pieces}.values())


def _side(entry: Entry) -> dict[str, Any]:
    artifact = entry.artifact
    return {
        "graph_hash": artifact.graph_hash,
        "label": artifact.label,
        "created": artifact.created,
        "format_version": artifact.format_version,
        "entry_bytes": entry.file_bytes,
        "blob_bytes": sum(blob.size for blob in artifact.blobs),
        "code_lines": sum(variant.code.count("\n") for variant in artifact.variants),
        "path": entry.path,
    }


def _compared(found: Comparison) -> dict[str, Any]:
    return {
        "factors": difference_records(found.factors),
        "contract": difference_records(found.contract),
        "code": list(found.code),
        "pieces": {
            "shared": [_piece(piece) for piece in found.shared],
            "only_a": [_piece(piece) for piece in found.only_a],
            "only_b": [_piece(piece) for piece in found.only_b],
        },
    }


def _piece(found: DistinctPiece) -> dict[str, Any]:
    piece = found.piece
    return {
        "key": piece.key,
        "backend": piece.backend,
        "calls": list(found.names),
        "blob": {"digest": piece.blob.digest, "bytes": piece.blob.size},
    }
