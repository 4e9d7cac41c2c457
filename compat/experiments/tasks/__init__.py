"""The original ``experiments.tasks``."""
