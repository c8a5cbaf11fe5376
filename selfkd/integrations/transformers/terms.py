"""A Trainer that logs the terms of a distillation's loss by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor
from transformers.trainer_utils import EvalLoopOutput

from selfkd.integrations.transformers.batches import TermSums
from selfkd.integrations.transformers.cached import CachedTrainer
from selfkd.losses.fused import weighted_sum


class TermsTrainer(CachedTrainer):
    """Trainer that logs terms as means: in training over steps, in evaluation over the data set."""

    alpha: float
    weights: Mapping[str, float]

    def start_sums(self) -> None:
        """Start the sums of terms."""
        self._sums, self._eval_sums = TermSums(), TermSums()
        self._steps = 0

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate, with each term as the mean over all of the data set's labels or tokens."""
        self._eval_sums.pop()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        terms = self._eval_sums.pop(self._reduction(summed=True))
        if terms:
            hard = terms.get("hard_loss", 0.0)
            loss = (
                weighted_sum(hard, terms["soft_loss"], self.alpha) if "soft_loss" in terms else hard
            )
            loss += sum(self.weights[name] * terms.get(f"{name}_loss", 0) for name in self.weights)
            terms = {"loss": loss, **terms}
        output.metrics.update({f"{metric_key_prefix}_{name}": terms[name] for name in terms})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the terms with the training loss, as means over the steps since the last log."""
        if "loss" in logs and self._steps:
            summed = self.args.average_tokens_across_devices
            logs = {**logs, **self._sums.pop(self._reduction(summed), self._steps)}
            self._steps = 0
        super().log(logs, start_time)

    def _reduction(self, summed: bool) -> Callable[[Tensor], Tensor] | None:
        if self.args.world_size == 1:
            return None
        return partial(self.accelerator.reduce, reduction="sum" if summed else "mean")
