"""``helmholtz study NAME``: a module per study."""
