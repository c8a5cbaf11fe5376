"""Training of one student: the loop, the API of user training functions, checkpoints, ranks."""
