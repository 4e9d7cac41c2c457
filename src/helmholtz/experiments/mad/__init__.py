"""The MAD benchmark."""
