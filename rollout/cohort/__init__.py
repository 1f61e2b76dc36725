"""Whole cohorts: every sample of a dataset attributed into a folder of Parquet parts, resumable at any moment."""

from rollout.cohort.run import attribute_cohort
from rollout.cohort.summary import CohortRun
from rollout.errors import CohortError

__all__ = ["CohortError", "CohortRun", "attribute_cohort"]
