"""``from experiments...``, as the README of the original Mamba-Hopfield-DEQ has it."""
