"""Number of the draw of each quantity of a view.

Each has its own, so that switching one augmentation leaves the others.
"""

FLIP, SHIFT_Y, SHIFT_X, AREA, ASPECT, TALL, CROP_Y, CROP_X = range(8)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(8, 12)
ERASED, ERASE_AREA, ERASE_ASPECT, ERASE_Y, ERASE_X = range(12, 17)
MIXED, MIX_KIND, MIX_WEIGHT, PARTNER, MIX_Y, MIX_X = range(17, 23)
OPERATION = 23
"""First of the draws of the operations in sequence: name, sign and magnitude of each."""
OF_OPERATION = 3
