"""Labelled images: loading data sets, splitting them, and iterating over batches."""

from .batches import Data as Data
from .batches import Split as Split
from .batches import batches as batches
from .load import fingerprint as fingerprint
from .load import load_data as load_data
