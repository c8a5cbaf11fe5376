"""The plug-in: a loss for any training loop, its teachers, and what it sees inside networks."""
