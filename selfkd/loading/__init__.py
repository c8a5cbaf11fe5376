"""Models of run folders, to be used."""
