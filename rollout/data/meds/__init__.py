"""MEDS, the Medical Event Data Standard: cohorts read from its folders, and folders of it written.

The tables are those of the package `meds` 0.4: events `subject_id, time, code, numeric_value, text_value` in
`data/**/*.parquet`, names and parents of codes in `metadata/codes.parquet`, and labels `subject_id, prediction_time,
…_value`.
"""

from rollout.data.meds.dataset import MedsDataset
from rollout.data.meds.folder import MedsFolder
from rollout.data.meds.vocabulary import fit_vocabulary, read_code_ids

__all__ = ["MedsDataset", "MedsFolder", "fit_vocabulary", "read_code_ids"]
