"""Training one student: the loop, the API of a user's own, progress that outlives a kill."""
