"""From a model to one graph with a contract."""

from stitchcache.capture.export import BoundTensor, Capture, capture

__all__ = ["BoundTensor", "Capture", "capture"]
