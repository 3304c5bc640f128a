"""A small decoder, and what ``stitchcache demo`` measures with it."""
