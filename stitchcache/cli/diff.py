"""``stitchcache diff``: what tells two entries apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from stitchcache.cli.layout import Column
from stitchcache.cli.options import cache_option, finding, json_option, open_cache
from stitchcache.cli.output import print_heading, print_json, print_pairs, print_table
from stitchcache.cli.words import printable, size_text
from stitchcache.errors import StitchCacheError

if TYPE_CHECKING:
    from stitchcache.report.compare import Comparison
    from stitchcache.report.pieces import DistinctPiece
    from stitchcache.report.read import Entry


@click.command()
@click.argument("a")
@click.argument("b")
@json_option
@cache_option
def command(a: str, b: str, as_json: bool, root: str | None) -> None:
    """Show what tells two entries apart; A and B are the beginnings of their graph hashes.

    Exit status 0 says that they are the same, 1 that they differ, 2 that they cannot be compared.
    """
    from stitchcache.cli.app import Misuse
    from stitchcache.report.compare import compare
    from stitchcache.report.read import read_entry

    cache = open_cache(root)
    try:
        one, two = read_entry(cache, a), read_entry(cache, b)
    except StitchCacheError as error:
        # As diff does it: 1 is kept for entries that were compared.
        raise Misuse(error.message) from error
    found = compare(one, two)
    same = one.artifact.graph_hash == two.artifact.graph_hash
    if as_json:
        print_json({"same": same, "a": _side(one), "b": _side(two), **_record(found)})
    else:
        _print(one, two, found, same)
    if not same:
        finding()


def _print(one: Entry, two: Entry, found: Comparison, same: bool) -> None:
    for name, entry in (("A", one), ("B", two)):
        side = _side(entry)
        sizes = f"entry {size_text(side['entry_bytes'])}, blobs {size_text(side['blob_bytes'])}"
        print_pairs([(name, f"{side['graph_hash']}  {side['label'] or '-'}  {sizes}")])
    if same:
        click.echo("They are the same entry.")
        return
    if found.empty:
        click.echo("Nothing that is recorded in them differs.")
    _print_differences("Factors", found.factors)
    _print_differences("Contract", found.contract)
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


def _print_differences(title: str, differences: Mapping[str, tuple[str, str]]) -> None:
    if differences:
        print_heading(title)
        columns = (Column("NAME", flexible=True), Column("A", flexible=True), Column("B", flexible=True))
        print_table(columns, [[name, old, new] for name, (old, new) in differences.items()])


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


def _record(found: Comparison) -> dict[str, Any]:
    from stitchcache.cli.explain import difference_records

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
