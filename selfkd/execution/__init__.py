"""Execution of jobs: pool, groups of workers, clusters, submission; the only importers of Ray."""

import os

# before Ray's threads run, which read the environment while it must not change
for _name, _value in {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # `ray.init` would wait for these workers, for ever where one of them dies, and holds the GIL
    "RAY_prestart_worker_first_driver": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1e9",  # runs resume from the run folder
    "TUNE_MAX_PENDING_TRIALS_PG": "1000000",  # the pool has a bound of its own
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # one line by selfkd instead
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}.items():
    os.environ.setdefault(_name, _value)
