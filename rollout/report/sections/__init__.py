"""The sections of the page: each takes the cohort and gives what its template shows."""
