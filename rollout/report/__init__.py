"""A cohort run as one HTML page that needs nothing else: no network, no script, no file beside it.

>>> from rollout.report import write_report
>>> write_report("run/")  # doctest: +SKIP
PosixPath('run/report.html')
"""

from rollout.errors import brought_by

with brought_by("cohort"):
    from rollout.report.page import write_report

__all__ = ["write_report"]
