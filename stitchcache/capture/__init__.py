"""From a model to one graph with a contract."""

from stitchcache.capture.export import Capture, capture, settled

__all__ = ["Capture", "capture", "settled"]
