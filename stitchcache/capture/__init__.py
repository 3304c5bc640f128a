"""From a model to one graph with a contract."""

from stitchcache.capture.export import Capture, capture, proved

__all__ = ["Capture", "capture", "proved"]
