"""Maps learnt one after another."""
