"""The original ``experiments.theory``."""
