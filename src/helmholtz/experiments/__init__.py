"""Experiments, a package each: data, models, what one run computes, its report; queues of runs; the report of all."""
