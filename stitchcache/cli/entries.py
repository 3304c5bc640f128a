"""``stitchcache ls``, ``inspect`` and ``diff``: what entries hold, and what tells two apart."""

from __future__ import annotations

from dataclasses import asdict, fields
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import click

from stitchcache.cli import Misuse, output as out
from stitchcache.errors import StitchCacheError, StoreError, printable
from stitchcache.explanation import names_text
from stitchcache.options import SizeRange

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stitchcache.artifact.entry import Header
    from stitchcache.cache import Cache
    from stitchcache.report.entry import Entry
    from stitchcache.types import Artifact

_ORDERS = {
    "created": lambda entry: (-entry["created"], entry["graph_hash"]),
    "size": lambda entry: (-_size(entry), entry["graph_hash"]),
    "label": lambda entry: (entry["label"], -entry["created"], entry["graph_hash"]),
}


@click.command()
@click.option("--sort", type=click.Choice(sorted(_ORDERS)), default="created", help="Order.")
@click.option("--wide", is_flag=True, help="Show graph hashes in full.")
@out.reading_options
def ls(sort: str, wide: bool) -> None:
    """List the entries of a cache.

    CALLS counts the calls of compiled pieces, BLOBS the different files behind them. SIZE is the entry with
    its blobs; a blob that entries share is counted in each of them.
    """
    cache = out.open_cache()
    entries = sorted(_listed(cache.entries()), key=_ORDERS[sort])
    out.show({"root": cache.paths[0], "entries": entries}, lambda found: _print_list(found, wide))


def _listed(headers: list[Header]) -> Iterator[out.Record]:
    # Not by asdict(), which copies each value: there may be thousands.
    names = [field.name for header in headers[:1] for field in fields(header)]
    for header in headers:
        record: out.Record = dict(zip(names, attrgetter(*names)(header), strict=True))
        record["entry_bytes"] = record.pop("file_bytes")
        record["blob_bytes"] = header.blob_bytes
        record["blobs"] = [{"digest": blob.digest, "bytes": blob.size} for blob in header.blobs]
        yield record


def _size(entry: out.Record) -> int:
    return int(entry["entry_bytes"] + entry["blob_bytes"])


def _print_list(record: out.Record, wide: bool) -> None:
    entries = record["entries"]
    if not entries:
        out.say(f"no entries in {record['root']}")
        return
    columns: dict[str, Any] = {"GRAPH": "graph_hash", "LABEL": "label", "CREATED": "created"}
    columns |= {"BACKEND": "backends", "CALLS": "pieces"}
    columns["BLOBS"] = lambda entry: len(entry["blobs"])
    columns["SIZE"] = lambda entry: out.size_text(_size(entry))
    columns |= {"COMPILED IN": "compile_seconds", "FORMAT": "format_version"}
    out.print_table(columns, entries, 64 if wide else out.short_length(e["graph_hash"] for e in entries))
    if out.on_terminal():
        blobs = {blob["digest"]: blob["bytes"] for entry in entries for blob in entry["blobs"]}
        size = out.size_text(sum(blobs.values()) + sum(entry["entry_bytes"] for entry in entries))
        click.echo(f"{out.count_text(len(entries), 'entry')}, {out.count_text(len(blobs), 'blob')}, {size}")


@click.command()
@click.argument("prefix", shell_complete=out.complete_entry)
@click.option("--code", is_flag=True, help="Only the generated code.")
@click.option("--pieces", is_flag=True, help="Only the pieces, one line a call.")
@click.option("--bindings", is_flag=True, help="Only the tensors taken from the model.")
@click.option("--factors", is_flag=True, help="Only the named parts of its keys.")
@click.option("--signature", is_flag=True, help="Only its signature: the statement, and the SSHSIG block.")
@click.option("--source", is_flag=True, help="Only what the compiler generated, where prewarm kept it.")
@click.option("--piece", metavar="NAME", help="The piece of --source: a call's name, or a key's beginning.")
@click.option("--profile", is_flag=True, help="Run it here on made-up inputs; time by piece and op.")
@click.option("--size", "sizes", type=(str, int), multiple=True, help="A size that may vary, for --profile.")
@click.option("--import", "imports", metavar="MODULE", multiple=True, help="Registers ops for --profile.")
@click.option("--wide", is_flag=True, help="Show keys and digests in full.")
@out.html_option
@out.shared_options
def inspect(
    prefix: str,
    piece: str | None,
    sizes: tuple[tuple[str, int], ...],
    imports: tuple[str, ...],
    wide: bool,
    **parts: bool,
) -> None:
    """Show what an entry holds; PREFIX is the beginning of its graph hash.

    Without an option: its header, what a call must bring, what it returns and the different pieces; the other
    parts have an option each. Entries of all formats can be shown. Nothing of the entry is run but by
    --profile, which needs no model: '--size s0 8' sets a size that may vary.

    --html writes one page with the stitching graph drawn, which any browser opens without a network.
    """
    from stitchcache.report.entry import binding_text, entry_record, read_entry

    cache, html = out.open_cache(), out.asked("html")
    entry = read_entry(cache, prefix)
    digits = 64 if wide else 12
    measured = None
    if parts["profile"]:
        from stitchcache.report.profile import profile

        measured = profile(cache, entry.artifact.graph_hash, dict(sizes), imports)
    parts["source"] |= piece is not None
    source = _source(cache, entry, piece) if parts["source"] else {}
    if html is not None:
        from stitchcache.report.drawing import entry_page

        out.write_page(html, entry_page(cache, entry, measured))

    def view(record: out.Record) -> None:
        if not any(parts.values()) and html is None:
            _print_overview(cache, entry, record, digits)
        if parts["pieces"]:
            _print_pieces(record, digits)
        if parts["bindings"]:
            bound = [
                {"kind": b.kind, "name": b.name, "tensor": binding_text(b)} for b in entry.artifact.bindings
            ]
            out.print_table({"KIND": "kind", "NAME": "name", "TENSOR": "tensor"}, bound)
        if parts["factors"]:
            digest = {"DIGEST": "digest"} if wide else {}
            out.print_table({"FACTOR": "name", **digest, "VALUE": "value"}, record["factors"], digits)
        if parts["signature"]:
            click.echo("\n".join(map(printable, entry.signature.decode("ascii", "replace").splitlines())))
        if parts["code"]:
            _print_code(entry.artifact)
        for key, files in source.items():
            for name, text in files.items():
                click.echo(f"// piece {key[:digits]}: {name}")
                click.echo("\n".join(printable(line.replace("\t", "    ")) for line in text.splitlines()))
        if measured is not None and html is None:
            _print_profile(measured, digits)

    record = {**entry_record(entry), "signature": _signature_record(entry)}
    record |= {} if measured is None else {"profile": measured}
    record |= {"source": source} if source else {}
    out.show(record, view, finding=parts["signature"] and not entry.signature)


def _source(cache: Cache, entry: Entry, piece: str | None) -> dict[str, dict[str, str]]:
    from stitchcache.store.sources import kept_sources

    name, artifact = piece or "", entry.artifact
    wanted = {p.key for p in artifact.pieces if p.name == name or p.key.startswith(name)}
    found = {key: files for key, files in kept_sources(cache, artifact.graph_hash).items() if key in wanted}
    if not found:
        said = f"entry {artifact.graph_hash[:12]} has no source of {piece or 'its pieces'}"
        raise StoreError(f"{said}: 'prewarm --keep-sources' keeps it.", path=entry.path)
    return found


def _print_profile(record: out.Record, digits: int) -> None:
    sizes = ", ".join(f"{name}={value}" for name, value in record["sizes"].items())
    facts: out.Fields = {
        "run on": lambda _: f"{record['device']}, {out.count_text(record['threads'], 'thread')}",
        "sizes": lambda _: sizes or None,
        "one call": lambda _: f"{out.seconds_text(record['seconds'])}, the median of {record['calls']}",
        "between pieces": "between_seconds",
    }
    out.print_facts(facts, record)
    shares: out.Fields = {"SHARE": lambda row: f"{100 * row['share']:.0f}%"}
    out.print_heading("Pieces")
    out.print_table({"PIECE": "key", "CALLS": "calls", "TIME": "seconds", **shares}, record["pieces"], digits)
    if record["ops"]:
        out.print_heading("Ops, as torch's profiler sees them, and kernels; not what a CPU's compiler fused")
        columns: out.Fields = {"OP": "op", "PIECE": "piece", "CALLS": "calls", "TIME": "seconds"}
        out.print_table(columns, record["ops"][:20], digits)


def _signature_record(entry: Entry) -> out.Record | None:
    """What a signature says, and whether it is good here; ``None`` where there is none."""
    if not entry.signature:
        return None
    from stitchcache.artifact.entry import Kind, signed_digest
    from stitchcache.store.openssh import read_statement
    from stitchcache.store.signed import Signers

    said = None
    try:
        said = asdict(read_statement(entry.signature)[1])
        with open(entry.path, "rb") as file:
            digest = signed_digest(file.read(), Kind.ENTRY)
        Signers().verify(entry.signature, "entry", entry.artifact.graph_hash, digest, path=entry.path)
        problem = ""
    except (StitchCacheError, OSError) as error:
        problem = str(error)
    return {"imported": entry.imported, "good": not problem, "problem": problem, "statement": said}


def _print_overview(cache: Cache, entry: Entry, record: out.Record, digits: int) -> None:
    from stitchcache.report.entry import gil_words, input_lines, output_lines, overview, piece_records

    artifact = entry.artifact
    distinct = piece_records(artifact)
    signed = _signature_words(record["signature"])
    out.print_pairs([*overview(entry), *([("signature", signed)] if signed else [])])
    if "inductor" in record["backends"]:
        click.echo(
            "Pieces of backend 'inductor' are pickles, which run what they say when they are loaded. They "
            "are loaded only where the owner of their files or a signature vouches for them, and hold the "
            "source of the piece and paths of the machine that compiled it."
        )
    for title, lines in (("Input", input_lines(artifact)), ("Output", output_lines(artifact))):
        out.print_heading(title)
        out.print_pairs(lines, indent="  ")
    shown = [text for variant in record["variants"] for text in variant["consts"]]
    if shown:
        out.print_heading("Constants")
        out.print_pairs([(str(index), text) for index, text in enumerate(shown)], indent="  ")
    if distinct:
        out.print_heading("Different pieces")
        words = gil_words(cache, artifact)
        columns: out.Fields = {
            "CALLS": lambda piece: len(piece["calls"]),
            "KEY": "key",
            "BACKEND": "backend",
            "BLOB": lambda piece: piece["blob"]["digest"],
            "SIZE": lambda piece: out.size_text(piece["blob"]["bytes"]),
            "GIL": lambda piece: words.get(piece["key"]),
            "CALLED AS": lambda piece: names_text(piece["calls"]),
        }
        out.print_table(columns, distinct, digits)


def _signature_words(found: out.Record | None) -> str | None:
    if found is None:
        return None
    said = found["statement"] or {"signer": "?", "expires": 0}
    until = f", good until {out.moment_text(said['expires'])}" if found["good"] else f": {found['problem']}"
    return f"{'imported, ' if found['imported'] else ''}signed by {said['signer']}{until}"


def _print_pieces(record: out.Record, digits: int) -> None:
    sizes: out.Fields = {"SIZES": lambda call: SizeRange(**call["size_range"])}
    some = sizes if len(record["variants"]) > 1 else {}
    columns = {"KEY": "key", "BACKEND": "backend", "BLOB": "blob", "SIZE": "bytes", "SHARED BY": "shared_by"}
    out.print_table({"NAME": "name", **some, **columns}, record["pieces"], digits)


def _print_code(artifact: Artifact) -> None:
    for variant in artifact.variants:
        if len(artifact.variants) > 1:
            click.echo(f"# sizes: {variant.size_range or 'all'}")
        code = "\n".join(printable(line.replace("\t", "    ")) for line in variant.code.splitlines())
        if out.on_terminal():
            from rich.console import Console
            from rich.syntax import Syntax

            Console().print(Syntax(code, "python", background_color="default", word_wrap=True))
        else:
            click.echo(code)


@click.command()
@click.argument("a", shell_complete=out.complete_entry)
@click.argument("b", shell_complete=out.complete_entry)
@out.html_option
@out.shared_options
def diff(a: str, b: str) -> None:
    """Show what tells two entries apart; A and B are the beginnings of their graph hashes.

    Exit status 0 says that they are the same, 1 that they differ, 2 that they cannot be compared.
    """
    from stitchcache.report.entry import compare, read_entry

    cache = out.open_cache()
    try:
        record = compare(read_entry(cache, a), read_entry(cache, b))
    except StitchCacheError as error:
        # As in diff(1): status 1 is kept for entries that were compared.
        raise Misuse(error.message) from error
    title = f"{record['a']['graph_hash'][:12]} and {record['b']['graph_hash'][:12]}"
    out.show(record, _print_comparison, finding=not record["same"], title=title)


def _print_comparison(record: out.Record) -> None:
    for name in ("a", "b"):
        side = record[name]
        sizes = f"entry {out.size_text(side['entry_bytes'])}, blobs {out.size_text(side['blob_bytes'])}"
        out.print_pairs([(name.upper(), f"{side['graph_hash']}  {side['label'] or '-'}  {sizes}")])
    if record["same"]:
        out.print_line("They are the same entry.")
        return
    pieces = record["pieces"]
    parts = [record["factors"], record["contract"], record["code"], pieces["only_a"], pieces["only_b"]]
    if not any(parts):
        out.print_line("Nothing that is recorded in them differs.")
    for part in ("factors", "contract"):
        if record[part]:
            out.print_heading(part.capitalize())
            out.print_table({"NAME": "name", "A": "old", "B": "new"}, record[part])
    if record["code"]:
        out.print_heading("Code")
        for line in record["code"]:
            colour = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1], "reset")
            out.print_line(line.replace("\t", "    "), colour)
    out.print_heading("Pieces")
    columns: out.Fields = {
        "WHERE": "where",
        "DIFFERENT": lambda found: len(found["pieces"]),
        "CALLS": lambda found: sum(len(piece["calls"]) for piece in found["pieces"]),
        "SIZE": lambda found: out.size_text(_blob_bytes(found["pieces"])),
    }
    places = {"in both": "shared", "only in A": "only_a", "only in B": "only_b"}
    out.print_table(columns, [{"where": where, "pieces": pieces[name]} for where, name in places.items()])


def _blob_bytes(pieces: list[out.Record]) -> int:
    return sum({piece["blob"]["digest"]: piece["blob"]["bytes"] for piece in pieces}.values())
