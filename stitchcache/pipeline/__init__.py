"""Three verbs over values that do not change: ``find``, ``make`` and ``start``.

``find`` says what a start can be served from (``Hit``) or why nothing is served (``Miss``). ``make`` compiles
what the cache lacks. ``start`` makes an artifact callable. docs/design.md has the walk of each road.
"""
