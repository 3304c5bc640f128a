"""``python -m stitchcache``: the same as the ``stitchcache`` command."""

from stitchcache.cli import main

main()
