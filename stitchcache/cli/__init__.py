"""The ``stitchcache`` command: finds subcommands when they are asked for, and words for errors.

Commands import torch, extras, and what takes long where they use it: all else, and the help, does without.
Exit status: 0 fine, 1 a finding (a target failed, a damaged entry, no such entry), 2 usage, 130 interrupted.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from keyword import iskeyword
from typing import IO, Any

from stitchcache import __version__, collection_paused
from stitchcache.errors import OptionError, StitchCacheError, TargetError

# Looking for garbage in what an import keeps is a tenth of what a reading command takes.
with collection_paused():
    import click

_GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "Compile": {
        "demo": ("demo", "--layers 8"),
        "prewarm": ("prewarm", "serving.targets:targets", "net.py:target --require -v"),
    },
    "Look": {
        "ls": ("entries", "--sort size", "--json --cache /models/cache"),
        "inspect": ("entries", "3d94ec", "3d94ec --html page.html", "3d94ec --profile --size s0 8"),
        "explain": ("explain", "serving.targets:targets", "3d94ec"),
        "diff": ("entries", "3d94ec 81f0b2", "3d94ec 81f0b2 --html page.html"),
        "report": ("report", "--all", "--html report.html"),
        "stats": ("upkeep", "--prometheus", "--remote"),
    },
    "Keep in order": {
        "verify": ("upkeep", "--repair"),
        "prune": ("upkeep", "--max-size 5G", "--max-age 30d --yes"),
        "rm": ("upkeep", "3d94ec 81f0b2"),
        "clear": ("upkeep", "--yes"),
        "migrate": ("upkeep", "--cache /models/cache"),
    },
    "Machines and settings": {
        "config": ("machine", "--json"),
        "doctor": ("machine", "/mnt/cache"),
        "machine": ("preflight", "> node.json"),
        "check": ("preflight", "--machine node.json"),
    },
    "Trust and move": {
        "keys": ("trust", "generate ci@example.com", "trust ci.pub --name ci@example.com"),
        "sign": ("trust", "3d94ec --days 30"),
        "export": ("trust", "models.bundle", "ranker.bundle --label 'ranker*'"),
        "import": ("trust", "models.bundle"),
        "push": ("trust", "--label 'ranker*'", "--remote s3://bucket/models"),
        "pull": ("trust", "--max-age 30d"),
        "image": ("trust", "build layout", "push layout registry.example/cache:1"),
    },
}
"""Commands in the order of the help page, each with the module that has it, and with examples."""
_COMMANDS = {name: found for names in _GROUPS.values() for name, found in names.items()}


class Failure(click.ClickException):
    """One of our errors on its way out: a message on stderr, and exit status 1."""

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the message."""
        click.echo(f"stitchcache: {self.message}", file=file, err=file is None)


class Misuse(Failure):
    """The same where what was typed makes no sense, and nothing was done."""

    exit_code = 2


class Commands(click.Group):
    """Commands that are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, in the order of the help page."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a name, or of the beginning of one; ``None`` where there is none, or are several."""
        names = [cmd_name] if cmd_name in _COMMANDS else _begun(cmd_name)
        if len(names) != 1:
            return None
        home, *examples = _COMMANDS[names[0]]
        module = importlib.import_module(f"stitchcache.cli.{home}")
        # ``import`` is no name that Python allows.
        command: click.Command = getattr(module, f"{names[0]}_" if iskeyword(names[0]) else names[0])
        command.epilog = _examples(*(f"{names[0]} {words}" for words in examples))
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that is meant, by its whole name."""
        if len(several := _begun(args[0])) > 1 and args[0] not in _COMMANDS and not ctx.resilient_parsing:
            ctx.fail(f"{args[0]!r} is the beginning of {', '.join(several)}; type more of it.")
        _, command, rest = super().resolve_command(ctx, args)
        return (None if command is None else command.name), command, rest

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands in groups."""
        width = max(map(len, _COMMANDS))
        for title, names in _GROUPS.items():
            found = [(name, self.get_command(ctx, name)) for name in names]
            with formatter.section(title):
                limit = formatter.width - width - 6
                rows = [(name.ljust(width), each.get_short_help_str(limit)) for name, each in found if each]
                formatter.write_dl(rows)

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
            click.echo(f"stitchcache: {said}", err=True)
            # As a shell tells it.
            ctx.exit(130)


def _begun(name: str) -> list[str]:
    return [each for each in _COMMANDS if name and each.startswith(name)]


def _examples(*commands: str) -> str:
    """The end of a help page; ``\b`` keeps its lines as they are."""
    return "\n".join(["\b", "Examples:", *(f"  stitchcache {words}" for words in commands)])


@click.command(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_examples("prewarm serving.targets:targets", "ls", "inspect 3d94ec --html page.html"),
)
@click.version_option(__version__, message="stitchcache %(version)s", help="Print the version.")
def commands() -> None:
    """Compile PyTorch models ahead of time, and look at what is compiled.

    The beginning of a command's name is enough. Exit status: 0 fine, 1 a finding, 2 usage.
    """


def main() -> None:
    """Entry point of the ``stitchcache`` script."""
    # A list of thousands of entries is kept to the end: looking for garbage in it takes a tenth of the time.
    gc.set_threshold(100_000)
    try:
        commands(prog_name="stitchcache")
    finally:
        # Nor for garbage among all that goes with the process. What torch made may need its order.
        if "torch" not in sys.modules:
            gc.freeze()
