"""What numbers say: metrics of predictions, statistics over seeds, verdicts in words."""
