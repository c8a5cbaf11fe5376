"""Cached teacher logits on disk: written once a view, read by every student."""
