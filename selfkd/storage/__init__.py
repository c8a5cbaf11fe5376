"""Atomic files, checkpoints and locks, on a local disk or in remote storage."""
