"""``stitchcache clear``: empty a cache."""

from __future__ import annotations

import click

from stitchcache.cli.options import cache_option, finding, json_option, open_cache
from stitchcache.cli.output import print_json
from stitchcache.cli.removed import print_removed, removed_record
from stitchcache.cli.words import count_text, size_text


@click.command()
@click.option("--yes", is_flag=True, help="Do it.")
@json_option
@cache_option
def command(yes: bool, as_json: bool, root: str | None) -> None:
    """Remove everything from a cache but what is in use. Nothing is removed without --yes."""
    cache = open_cache(root)
    if not yes:
        stats = cache.stats()
        if as_json:
            print_json({"root": str(cache.root), "files": stats.files, "bytes": stats.bytes, "done": None})
        else:
            click.echo(
                f"{cache.root} holds {count_text(stats.entries, 'entry', 'entries')}, "
                f"{count_text(stats.files, 'file')} in all, {size_text(stats.bytes)}."
            )
            click.echo("Nothing was removed. Repeat with --yes to remove it.")
        return
    result = cache.clear()
    if as_json:
        print_json(
            {
                "root": str(cache.root),
                "files": result.files,
                "bytes": result.bytes,
                "done": removed_record(result),
            }
        )
    else:
        print_removed(result)
    if result.failed or result.busy:
        finding()
