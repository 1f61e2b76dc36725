"""A cohort run as a reader finds it: the folder of its parts, tables and sums over its rows, pictures."""
