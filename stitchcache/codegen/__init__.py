"""Source for stitching graphs, and callables from it. Imports nothing: a warm start needs little of it."""
