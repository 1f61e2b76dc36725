"""Attribution methods scored over whole cohorts, by what the model predicts without the codes they rank first.

`settings` says how, `methods`, `stored` and `truth` what is scored against what, `predictor` asks the model, `scoring`
does a batch, and `task` and `run` make a cohort run of it.
"""

from rollout.cohort.evaluation.run import evaluate_cohort

__all__ = ["evaluate_cohort"]
