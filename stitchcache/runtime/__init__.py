"""From an artifact to a callable."""
