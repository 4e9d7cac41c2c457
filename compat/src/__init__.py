"""``from src...``, as the README of the original Mamba-Hopfield-DEQ has it."""
