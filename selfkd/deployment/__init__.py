"""Trained networks as files that are served: exported, pruned, in low precision, timed."""
