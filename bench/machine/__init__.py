"""The machine a benchmark runs on, what it can do at most, and the record of its runs."""
