"""The original ``src.training``."""
