"""Language models at matched parameters."""
