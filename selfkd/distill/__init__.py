"""Distillation for any training loop: the loss, its teachers, and features of networks."""
