"""What a run file stands for: PyHealth classes by name, samples prepared once, weights, settings, the run itself."""
