"""Adapters of `selfkd.Distiller` to other libraries' training loops, each imported by its name."""
