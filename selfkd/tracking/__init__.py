"""W&B: what is logged when, runs and network faults, artifacts. Nothing else imports wandb."""

from selfkd.tracking.tracker import NoTracker as NoTracker
from selfkd.tracking.tracker import WandbTracker as WandbTracker
from selfkd.tracking.tracker import make_tracker as make_tracker
