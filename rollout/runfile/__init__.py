"""Run files: which model on which samples, in TOML or JSON. `rollout.runfile.file` explains each key."""

from rollout.errors import brought_by

with brought_by("cohort"):
    from rollout.data.samples import SampleSource, prepare_samples
    from rollout.results.layout import CACHE
    from rollout.runfile.file import RunFile, read_run_file, save_model

__all__ = ["CACHE", "RunFile", "SampleSource", "prepare_samples", "read_run_file", "save_model"]
