"""Recall from a memory and from a context."""
