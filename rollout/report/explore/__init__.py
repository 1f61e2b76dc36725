"""A page for a whole cohort, served to its own machine alone: search, one record, a code's patients, two runs."""

from rollout.report.explore.server import explore

__all__ = ["explore"]
