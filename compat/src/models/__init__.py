"""The original ``src.models``."""
