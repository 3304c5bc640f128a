"""Graphs: split at chosen ops, read symbolic sizes, hash canonically."""

from stitchcache.graph.canonical import graph_hash
from stitchcache.graph.split import SplitItem, split_graph

__all__ = ["SplitItem", "graph_hash", "split_graph"]
