"""``stitchcache ls``: the entries of a cache, from their headers alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from stitchcache.cli.layout import Column
from stitchcache.cli.options import cache_option, json_option, open_cache
from stitchcache.cli.output import on_terminal, print_json, print_table
from stitchcache.cli.words import age_text, count_text, seconds_text, short_length, size_text

if TYPE_CHECKING:
    from stitchcache.artifact.record import Header

_COLUMNS = (
    Column("GRAPH"),
    Column("LABEL", flexible=True),
    Column("CREATED", optional=True),
    Column("BACKEND", optional=True),
    Column("CALLS", right=True, optional=True),
    Column("BLOBS", right=True, optional=True),
    Column("SIZE", right=True),
    Column("COMPILED IN", right=True, optional=True),
    Column("FORMAT", right=True, optional=True),
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
def command(sort: str, wide: bool, as_json: bool, root: str | None) -> None:
    """List the entries of a cache.

    CALLS counts the calls of compiled pieces, BLOBS the different files behind them. SIZE is the entry with
    its blobs; a blob that entries share is counted in each of them.
    """
    cache = open_cache(root)
    headers = sorted(cache.entries(), key=_ORDERS[sort])
    if as_json:
        print_json({"root": str(cache.root), "entries": [_record(header) for header in headers]})
        return
    if not headers:
        click.echo(f"no entries in {cache.root}", err=True)
        return
    length = 64 if wide else short_length(header.graph_hash for header in headers)
    print_table(_COLUMNS, [_row(header, length) for header in headers])
    if on_terminal():
        click.echo(_summary(headers))


def _size(header: Header) -> int:
    return header.file_bytes + header.blob_bytes


def _row(header: Header, length: int) -> list[str]:
    return [
        header.graph_hash[:length],
        header.label or "-",
        age_text(header.created),
        ",".join(header.backends) or "-",
        str(header.pieces),
        str(header.blob_count),
        size_text(_size(header)),
        seconds_text(header.compile_seconds) if header.compile_seconds else "-",
        str(header.format_version),
    ]


def _record(header: Header) -> dict[str, Any]:
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
    entries = count_text(len(headers), "entry", "entries")
    return f"{entries}, {count_text(len(blobs), 'blob')}, {size_text(size)}"
