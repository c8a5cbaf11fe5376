"""Distillation losses: pure functions of tensors."""

from selfkd.losses.distillation import Average as Average
from selfkd.losses.distillation import DistillationTerms as DistillationTerms
from selfkd.losses.distillation import distillation_loss as distillation_loss
from selfkd.losses.distillation import distillation_terms as distillation_terms
from selfkd.losses.distillation import soft_targets as soft_targets
from selfkd.losses.sparse import SparseLogits as SparseLogits
from selfkd.losses.sparse import sparse_terms as sparse_terms
from selfkd.losses.sparse import sparsify as sparsify
