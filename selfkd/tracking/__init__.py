"""W&B: what is logged when, runs and network faults, artifacts; and the same in files.

Nothing else imports wandb.
"""

from selfkd.tracking.base import NoTracker as NoTracker
from selfkd.tracking.files import FileTracker as FileTracker
from selfkd.tracking.make import make_tracker as make_tracker
from selfkd.tracking.tracker import WandbTracker as WandbTracker
