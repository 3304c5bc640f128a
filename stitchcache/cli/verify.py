"""``stitchcache verify``: read every file of a cache, and say what is wrong."""

from __future__ import annotations

from dataclasses import asdict

import click

from stitchcache.cli.layout import Column
from stitchcache.cli.options import cache_option, finding, json_option, open_cache
from stitchcache.cli.output import print_json, print_table
from stitchcache.cli.words import count_text, size_text


@click.command()
@click.option("--repair", is_flag=True, help="Move damaged files to quarantine; remove what leads nowhere.")
@json_option
@cache_option
def command(repair: bool, as_json: bool, root: str | None) -> None:
    """Check every byte of a cache.

    Exit status 1 says that something is wrong and was not repaired. What went to quarantine is compiled
    again when it is next asked for.
    """
    cache = open_cache(root)
    report = cache.verify(repair=repair)
    if as_json:
        print_json({"root": str(cache.root), "clean": report.clean, **asdict(report)})
    else:
        if report.findings:
            columns = (Column("PROBLEM"), Column("REPAIRED"), Column("FILE"), Column("DETAIL", flexible=True))
            rows = [[f.problem, "yes" if f.repaired else "no", f.path, f.detail] for f in report.findings]
            print_table(columns, rows)
        seen = (
            f"{count_text(report.entries, 'entry', 'entries')}, {count_text(report.blobs, 'blob')}, "
            f"{count_text(report.targets, 'target')}, {count_text(report.pieces, 'piece')}"
        )
        verdict = "all sound" if not report.findings else count_text(len(report.findings), "finding")
        click.echo(f"{seen}, {size_text(report.bytes)} read: {verdict}")
    if not report.clean:
        finding()
