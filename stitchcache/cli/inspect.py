"""``stitchcache inspect``: one entry in full."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stitchcache.cli.layout import Column
from stitchcache.cli.options import cache_option, json_option, open_cache
from stitchcache.cli.output import on_terminal, print_heading, print_json, print_pairs, print_table
from stitchcache.cli.words import count_text, moment_text, printable, seconds_text, size_text
from stitchcache.errors import AmbiguousPrefixError

if TYPE_CHECKING:
    from stitchcache.artifact.record import Artifact
    from stitchcache.cache import Cache
    from stitchcache.report.read import Entry

_KEY = 12


@click.command()
@click.argument("prefix")
@click.option("--code", is_flag=True, help="Only the generated code.")
@click.option("--pieces", is_flag=True, help="Only the pieces, one line a call.")
@click.option("--bindings", is_flag=True, help="Only the tensors taken from the model.")
@click.option("--factors", is_flag=True, help="Only the named parts of its keys.")
@click.option("--wide", is_flag=True, help="Show keys and digests in full.")
@json_option
@cache_option
def command(
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
        from stitchcache.report.record import entry_record

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
    from stitchcache.report.read import read_entry

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
    from stitchcache.report.contract import input_lines, output_lines
    from stitchcache.report.pieces import distinct_pieces, names_text

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
    from stitchcache.report.pieces import piece_rows

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
    from stitchcache.report.contract import binding_text

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
