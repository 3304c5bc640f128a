"""Source code for stitching graphs (``generate``), and callables from source code (``execution``, ``gate``).

Imports nothing by itself: a warm start needs ``execution`` alone.
"""
