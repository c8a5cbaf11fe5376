"""What a worker does: from plain data to plain data."""
