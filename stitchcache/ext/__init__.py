"""Optional roads, each behind an extra of its own and imported by name only."""
