"""W&B: what is logged when, its runs and the faults of a network, artifacts. Wandb stays here."""

from selfkd.tracking.tracker import NoTracker as NoTracker
from selfkd.tracking.tracker import WandbTracker as WandbTracker
from selfkd.tracking.tracker import make_tracker as make_tracker
