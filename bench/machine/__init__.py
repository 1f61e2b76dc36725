"""The machine a benchmark runs on, and the record of its runs."""
