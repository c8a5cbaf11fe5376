"""Who does the jobs: a pool of Ray workers, groups of them, clusters. Ray stays here."""
