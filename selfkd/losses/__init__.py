"""Distillation losses as pure functions of tensors, all of which can be imported from here.

They are means; docs/conventions.md converts the weights of papers that take sums.
"""

from selfkd.losses.averaging import Average as Average
from selfkd.losses.averaging import ensemble_logits as ensemble_logits
from selfkd.losses.contrast import ContrastiveMemory as ContrastiveMemory
from selfkd.losses.contrast import crd_loss as crd_loss
from selfkd.losses.distillation import DistillationTerms as DistillationTerms
from selfkd.losses.distillation import distillation_loss as distillation_loss
from selfkd.losses.distillation import distillation_terms as distillation_terms
from selfkd.losses.distillation import hard_loss as hard_loss
from selfkd.losses.distillation import soft_targets as soft_targets
from selfkd.losses.divergences import Divergence as Divergence
from selfkd.losses.features import Projection as Projection
from selfkd.losses.features import attention_matrices as attention_matrices
from selfkd.losses.features import attention_transfer as attention_transfer
from selfkd.losses.features import cosine_embedding as cosine_embedding
from selfkd.losses.features import every_other as every_other
from selfkd.losses.features import hidden_state_loss as hidden_state_loss
from selfkd.losses.features import hint_loss as hint_loss
from selfkd.losses.features import pkt as pkt
from selfkd.losses.features import reconcile as reconcile
from selfkd.losses.features import similarity_preserving as similarity_preserving
from selfkd.losses.logits import confidence_weighted_loss as confidence_weighted_loss
from selfkd.losses.logits import confidence_weights as confidence_weights
from selfkd.losses.logits import dist_loss as dist_loss
from selfkd.losses.logits import dkd_loss as dkd_loss
from selfkd.losses.logits import hard_teacher_loss as hard_teacher_loss
from selfkd.losses.logits import jensen_shannon as jensen_shannon
from selfkd.losses.logits import logit_mse as logit_mse
from selfkd.losses.logits import permute_nontarget as permute_nontarget
from selfkd.losses.logits import reverse_kl as reverse_kl
from selfkd.losses.logits import soft_cross_entropy as soft_cross_entropy
from selfkd.losses.logits import standardize_logits as standardize_logits
from selfkd.losses.logits import standardized_loss as standardized_loss
from selfkd.losses.logits import teacher_free_logits as teacher_free_logits
from selfkd.losses.multi_label import multi_label_terms as multi_label_terms
from selfkd.losses.regression import regression_terms as regression_terms
from selfkd.losses.relations import rkd_angle as rkd_angle
from selfkd.losses.relations import rkd_distance as rkd_distance
from selfkd.losses.sequences import LinearLogits as LinearLogits
from selfkd.losses.sequences import SampledTargets as SampledTargets
from selfkd.losses.sequences import liger_fits as liger_fits
from selfkd.losses.sequences import linear_sequence_terms as linear_sequence_terms
from selfkd.losses.sequences import sampled_targets as sampled_targets
from selfkd.losses.sequences import sequence_terms as sequence_terms
from selfkd.losses.sparse import SparseLogits as SparseLogits
from selfkd.losses.sparse import sparse_terms as sparse_terms
from selfkd.losses.sparse import sparsify as sparsify
