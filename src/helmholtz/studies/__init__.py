"""Studies: the benchmarks that the three ideas stand on, each a queue of small runs and a table of what they gave."""
