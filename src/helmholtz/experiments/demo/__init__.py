"""The demo: each system in the setting that it is for, in a few minutes, on one page."""
