"""Adapters of `selfkd.Distiller` to training loops of others, each imported by its own name."""
