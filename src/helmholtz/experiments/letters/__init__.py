"""What a plan holds of sequences of letters, by the free bits per token."""
