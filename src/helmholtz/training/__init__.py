"""Training: one native loop, its settings, its checkpoints and its hooks."""
