"""Is an attribution faithful to the model? What its prediction does when codes of the record are gone.

`scores` has the means of one batch, `sets` says which codes are kept, `removal` what stands in place of the others, and
`stack` has a model predict for many such records at once. Whole cohorts: `rollout.evaluate_cohort`.
"""

from rollout.evaluate.scores import PERCENTAGES, Faithfulness, evaluate, faithfulness
from rollout.evaluate.sets import top_codes

__all__ = ["PERCENTAGES", "Faithfulness", "evaluate", "faithfulness", "top_codes"]
