"""What a removal did, for ``prune`` and ``clear``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from stitchcache.cli.words import count_text, size_text

if TYPE_CHECKING:
    from stitchcache.store.evict import PruneResult


def removed_record(result: PruneResult) -> dict[str, Any]:
    """The same as JSON."""
    return asdict(result)


def print_removed(result: PruneResult) -> None:
    """Say what went, and what did not."""
    if result.busy:
        click.echo("another process is pruning this cache; nothing was removed", err=True)
        return
    for path, reason in result.failed:
        click.echo(f"{path}: cannot be removed ({reason})", err=True)
    in_use = f"; {count_text(len(result.in_use), 'entry', 'entries')} in use stayed" if result.in_use else ""
    click.echo(
        f"removed {count_text(len(result.entries), 'entry', 'entries')}, "
        f"{count_text(result.files, 'file')} in all, {size_text(result.bytes)}{in_use}"
    )
