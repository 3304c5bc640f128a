"""Keys that can be computed without tracing, and why two of them differ."""
