"""Figures of a report, from plain values."""
