"""What to do: the best shape for a budget, its price, the next run, validation."""
