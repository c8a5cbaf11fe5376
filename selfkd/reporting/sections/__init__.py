"""Sections of a report: the figures of a run with their words and tables."""
