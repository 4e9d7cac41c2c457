"""Time series of many variates."""
