"""Whole cohorts: every sample of a dataset attributed into a folder of Parquet parts, resumable at any moment."""

from rollout.cohort.run import attribute_cohort
from rollout.cohort.store import CohortError
from rollout.cohort.summary import CohortRun

__all__ = ["CohortError", "CohortRun", "attribute_cohort"]
