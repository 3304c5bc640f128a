"""From a captured graph to what has to be compiled."""

from stitchcache.plan.plan import Plan, PlannedPiece, plan

__all__ = ["Plan", "PlannedPiece", "plan"]
