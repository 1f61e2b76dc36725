"""Whole cohorts: every sample of a dataset attributed into a folder of Parquet parts, resumable at any moment."""

from rollout.errors import CohortError, brought_by

with brought_by("cohort"):
    from rollout.cohort.run import attribute_cohort
    from rollout.cohort.summary import CohortRun

__all__ = ["CohortError", "CohortRun", "attribute_cohort"]
