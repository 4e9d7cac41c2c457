"""Evaluation: language modelling quality, speed and memory, comparisons and figures."""
