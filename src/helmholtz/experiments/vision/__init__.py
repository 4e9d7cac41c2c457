"""Small images."""
