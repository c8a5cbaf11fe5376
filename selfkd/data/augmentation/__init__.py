"""Data augmentation as a pure function of (seed, image index, view number).

Cached teacher logits belong to one image under one augmentation. The random numbers of a view are
therefore a hash of seed, index and view, not the state of a generator: view 3 of image 17 has the
same pixels in any batch, order, process and number of workers, and on any device.
"""

from .mixing import Mixing as Mixing
from .numbers import random_bits as random_bits
from .operations import Operations as Operations
from .views import Views as Views
