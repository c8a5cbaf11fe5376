"""Distillation in the Trainer of transformers: of logits, hidden states and attention.

Needs `pip install 'selfkd[transformers]'`.
"""

from selfkd.integrations.transformers.layers import start_from_teacher as start_from_teacher
from selfkd.integrations.transformers.trainer import DistillationTrainer as DistillationTrainer
