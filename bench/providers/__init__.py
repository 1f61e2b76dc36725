"""Who computes a rollout in the benchmarks, and what each is checked against."""
