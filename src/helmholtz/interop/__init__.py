"""Doors to other code: the spellings of the original publications."""
