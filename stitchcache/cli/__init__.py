"""The ``stitchcache`` command; one module a subcommand. Imports no torch by itself."""

from stitchcache.cli.app import main

__all__ = ["main"]
