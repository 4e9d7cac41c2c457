"""Recall and periodic sequences for models that solve for an equilibrium."""
