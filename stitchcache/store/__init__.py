"""Directories that keep promises: publish, read, lock, trust, evict. Bytes and files only; no torch."""
