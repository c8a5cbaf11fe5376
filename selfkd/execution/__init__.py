"""Execution of jobs: pool, groups of workers, clusters, submission; the only importers of Ray."""
