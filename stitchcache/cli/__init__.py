"""The ``stitchcache`` command: finds subcommands when they are asked for, and words for errors.

Exit status: 0 fine, 1 a finding (a target failed, a damaged entry, no such entry), 2 usage, 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
from keyword import iskeyword
from typing import IO, Any

import click

from stitchcache import __version__
from stitchcache.errors import OptionError, StitchCacheError, TargetError

_HOMES = {
    "demo": "demo",
    "prewarm": "prewarm",
    "ls": "entries",
    "inspect": "entries",
    "explain": "explain",
    "diff": "entries",
    "verify": "upkeep",
    "prune": "upkeep",
    "rm": "upkeep",
    "clear": "upkeep",
    "stats": "upkeep",
    "report": "report",
    "config": "machine",
    "doctor": "machine",
    "machine": "preflight",
    "check": "preflight",
    "keys": "trust",
    "sign": "trust",
    "export": "trust",
    "import": "trust",
    "image": "trust",
    "migrate": "upkeep",
}
"""Commands in the order of the help page, with the module that has them."""


class Failure(click.ClickException):
    """One of our errors on its way out: a message on stderr, and exit status 1."""

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the message."""
        click.echo(f"stitchcache: {self.message}", file=file, err=file is None)


class Misuse(Failure):
    """The same where what was typed makes no sense, and nothing was done."""

    exit_code = 2


class Interrupted(Failure):
    """Ctrl-C, as a shell tells it."""

    exit_code = 130


class Commands(click.Group):
    """Commands that are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, in the order of the help page."""
        return list(_HOMES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a name; ``None`` where there is none."""
        if cmd_name not in _HOMES:
            return None
        module = importlib.import_module(f"stitchcache.cli.{_HOMES[cmd_name]}")
        # ``import`` is no name that Python allows.
        command: click.Command = getattr(module, f"{cmd_name}_" if iskeyword(cmd_name) else cmd_name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; our errors become one message, unless ``STITCHCACHE_DEBUG`` is set."""
        try:
            return super().invoke(ctx)
        except StitchCacheError as error:
            if os.environ.get("STITCHCACHE_DEBUG", "") not in ("", "0"):
                raise
            kind: type[Failure] = Misuse if isinstance(error, (OptionError, TargetError)) else Failure
            raise kind(error.message) from error
        except KeyboardInterrupt:
            # Files are put in place whole, entries after their pieces.
            said = "interrupted. What was stored until now is kept; the same command goes on from there."
            raise Interrupted(said) from None


@click.command(
    cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, message="stitchcache %(version)s", help="Print the version.")
def commands() -> None:
    """Compile PyTorch models ahead of time, and look at what is compiled.

    Exit status: 0 fine, 1 a finding, 2 usage.
    """


def main() -> None:
    """Entry point of the ``stitchcache`` script."""
    commands(prog_name="stitchcache")
