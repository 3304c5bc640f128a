"""Graphs: split at chosen ops, read symbolic sizes, hash canonically.

Imports nothing by itself: reading symbolic sizes needs sympy, which a warm start has no use for.
"""
