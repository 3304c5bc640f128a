"""Both sides of what a capture depends on beyond the model: recorded once, checked at each lookup."""

from stitchcache.keys.check import check_sources
from stitchcache.keys.recorder import SourceRecorder

__all__ = ["SourceRecorder", "check_sources"]
