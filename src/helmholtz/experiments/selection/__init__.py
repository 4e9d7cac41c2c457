"""Channel-wise selection."""
