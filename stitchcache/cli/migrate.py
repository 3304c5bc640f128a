"""``stitchcache migrate``: rewrite entries of old formats in the current one."""

from __future__ import annotations

import click

from stitchcache.cli.options import cache_option, json_option, open_cache
from stitchcache.cli.output import print_json
from stitchcache.cli.words import count_text


@click.command()
@json_option
@cache_option
def command(as_json: bool, root: str | None) -> None:
    """Rewrite entries of older formats; each old file goes once its successor is stored."""
    cache = open_cache(root)
    done = cache.migrate()
    if as_json:
        print_json({"root": str(cache.root), "migrated": done})
        return
    for graph_hash in done:
        click.echo(graph_hash)
    click.echo(f"rewrote {count_text(len(done), 'entry', 'entries')} in {cache.root}", err=True)
