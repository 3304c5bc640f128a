"""Graphs: split, read symbolic sizes, hash. Imports nothing: a warm start has no use for sympy."""
