"""How objects show themselves in a notebook, and what the explorer shows of them. Imported when something is shown."""
