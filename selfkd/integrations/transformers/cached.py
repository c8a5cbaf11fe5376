"""Cached teacher logits in the Trainer of transformers: the rows of a batch, and their logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from selfkd.integrations.transformers.host import HostCollate
from selfkd.integrations.transformers.inputs import IGNORED, match_cached_classes
from selfkd.integrations.transformers.projection import ProjectionTrainer
from selfkd.losses.sequences import SampledTargets, TokenTeacher
from selfkd.losses.sparse import SparseLogits
from selfkd.soft_targets.store import SoftTargets
from selfkd.soft_targets.tokens import (
    NO_ROW,
    TokenIndex,
    TokenTargets,
    check_padding,
    gathered,
)

ROWS = "soft_target_rows"
"""Key of a batch with the row of the cached logits of each item `[batch]` or token
`[batch, length]`."""
Targets = SoftTargets | TokenTargets
"""Cached logits, as from `selfkd.cache_logits`."""


class NumberedItems(Dataset[tuple[Any, int]]):
    """Map-style data set whose items come with their numbers."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> tuple[Any, int]:
        return self.dataset[number], number

    def __getitems__(self, numbers: list[int]) -> list[tuple[Any, int]]:
        several = getattr(self.dataset, "__getitems__", None)  # `datasets` reads a batch at once
        items = several(numbers) if several else [self.dataset[number] for number in numbers]
        return list(zip(items, numbers, strict=True))


class RowsCollate:
    """Collate that adds the rows of the cached logits to a batch, checked against its tokens.

    Args:
        collate: Collate of the items.
        index: Rows of the tokens; None where rows are items.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], index: TokenIndex | None) -> None:
        self.collate, self.index = collate, index

    def __call__(self, pairs: Sequence[tuple[Any, int]]) -> Any:
        items, numbers = [item for item, _ in pairs], [number for _, number in pairs]
        index = self.index
        tokens = [] if index is None else [index.check(*pair) for pair in zip(numbers, items)]  # noqa: B905
        batch = self.collate(items)
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"data_collator must return a mapping with targets, got {type(batch).__name__}"
            )
        if index is None:
            rows = np.asarray(numbers)
        elif len(tokens) > 1 and len(batch[index.column]) == 1:  # as DataCollatorWithFlattening
            check_padding(batch, [np.concatenate(tokens)], index.column)
            lengths = [len(each) for each in tokens]
            parts = [index.rows([n], size)[0] for n, size in zip(numbers, lengths, strict=True)]
            rows = np.concatenate(parts)[None]
        else:
            check_padding(batch, tokens, index.column)
            rows = index.rows(numbers, batch[index.column].shape[1])
        batch[ROWS] = torch.from_numpy(rows)  # type: ignore[index]
        return batch


class CachedTrainer(ProjectionTrainer):
    """Trainer that gives batches of its training set the rows of cached logits.

    Attributes:
        targets: Cached logits of the training set; None with a live teacher.
    """

    targets: Targets | None = None
    data_collator: Any
    _compared: int | None = None

    def check_targets(self, temperature: float, divergence: str) -> None:
        """Raise ValueError where the loss needs what is not cached, or the training set is another.

        Args:
            temperature: Temperature T.
            divergence: Divergence of the soft term.
        """
        targets, dataset = self.targets, self.train_dataset
        if targets is None:
            return
        found = targets(torch.zeros(1, dtype=torch.int64), 0)
        sampled = isinstance(found, SampledTargets)
        at_one = sampled or (isinstance(found, SparseLogits) and found.rest_grid is None)
        if at_one and temperature != 1:
            kind = "samples" if sampled else "log-probabilities"
            raise ValueError(
                f"temperature must be 1 with targets of {kind}, which are known at T = 1 only, got "
                f"{temperature}"
            )
        if divergence != "forward_kl" and not isinstance(found, Tensor):
            raise ValueError(
                "divergence must be 'forward_kl' where targets are samples or the largest logits, "
                f"got {divergence!r}: others need all logits (top_k=None)"
            )
        if targets.views != 1:
            raise ValueError(f"targets must have one view, got {targets.views}")
        if dataset is None:
            return
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
            raise ValueError(
                "train_dataset must be map-style with targets, whose rows are its items by number, "
                f"got {type(dataset).__name__}"
            )
        count = targets.items if isinstance(targets, TokenTargets) else targets.images
        if len(dataset) != count:
            raise ValueError(
                f"train_dataset must be the data set whose logits are cached, of {count} items, "
                f"got {len(dataset)}"
            )
        if isinstance(targets, TokenTargets):
            for number in (0, count - 1):
                targets.index.check(number, dataset[number])

    def match_targets(self, model: nn.Module) -> None:
        """Match a student with the cached logits: classes and vocabulary."""
        if self.targets is not None:
            names = self.targets.origin.get("id2label", ())
            self._compared = match_cached_classes(
                model, self.targets.classes, self.processing_class, names
            )

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Callable[[Any], Any] | None = None,
        **further: Any,
    ) -> Any:
        make = super()._get_dataloader
        if dataset is not self.train_dataset:
            return make(dataset, description, batch_size, sampler_fn, **further)
        own, given, sampler = self.data_collator, dataset, sampler_fn
        collate = own
        if self.targets is not None:
            if hasattr(dataset, "column_names") and hasattr(dataset, "remove_columns"):
                given = self._remove_unused_columns(dataset, description=description)
            else:
                collate = self._get_collator_with_removed_columns(own, description=description)
            index = self.targets.index if isinstance(self.targets, TokenTargets) else None
            given, collate = NumberedItems(given), RowsCollate(collate, index)
            sampler = None if sampler_fn is None else lambda _: sampler_fn(dataset)
        self.data_collator = self._with_copies(collate, dataset)
        try:
            return make(given, description, batch_size, sampler, **further)
        finally:
            self.data_collator = own

    def _with_copies(self, collate: Callable[[list[Any]], Any], dataset: Any) -> Any:
        """Return a collate that keeps a batch's integers on the CPU, too, where there is a GPU.

        A batch that a process divides among all of them has none.
        """
        divided = isinstance(dataset, IterableDataset) or self.accelerator.dispatch_batches
        if self.args.device.type != "cuda" or divided:
            return collate
        return HostCollate(collate)

    def cached_teacher(
        self, inputs: Mapping[str, Any], logits: Tensor, labels: Tensor, *, training: bool
    ) -> TokenTeacher | None:
        """Return the cached logits of a batch; None in the evaluation of another data set.

        Args:
            inputs: Inputs of the batch, with its rows, on the device of the labels.
            logits: Logits of the student, `[batch, classes]` or `[batch, length, ...]`.
            labels: Labels `[batch]`, or `[batch, length]` aligned with the logits; those of -100
                have the logits of any row.
            training: Whether there must be rows.

        Raises:
            ValueError: Logits of tokens for a student of items, or the other way round, or a token
                of the loss that has no cached logits.
        """
        targets, rows = self.targets, inputs.get(ROWS)
        if targets is None or rows is None:
            if training:
                raise ValueError(
                    f"batches must have {ROWS} with targets, got {sorted(inputs)}: get_train_"
                    "dataloader must be that of Trainer"
                )
            return None
        if rows.shape != logits.shape[:-1]:
            kinds = ["items" if each == 1 else "tokens" for each in (logits.ndim - 1, rows.ndim)]
            raise ValueError(
                f"targets must be of {kinds[0]} {list(logits.shape[:-1])}, as the student's logits "
                f"are, got rows of {kinds[1]} {list(rows.shape)}"
            )
        items = rows.ndim == 1  # whose labels may be several
        needed = torch.ones_like(rows, dtype=torch.bool) if items else labels != IGNORED
        chosen = torch.where(needed, rows, NO_ROW - 1).cpu()
        if (missing := chosen == NO_ROW).any():
            place = missing.nonzero()[0].tolist()
            raise ValueError(
                "labels must be -100 where there are no cached logits (padding, or a prompt whose "
                f"log-probabilities were not imported), got another in row {place[0]}, token "
                f"{place[-1]}"
            )
        there = chosen[chosen >= 0]
        chosen[chosen < 0] = there[0] if len(there) else 0
        found = targets(chosen.flatten(), 0)
        if not isinstance(found, Tensor) and self._compared is not None:
            largest = int(found.indices.max())
            if largest >= self._compared:
                raise ValueError(
                    "targets must have tokens of the student's vocabulary, below "
                    f"{self._compared}, got token {largest}: student.resize_token_embeddings("
                    f"{targets.classes})"
                )
        return gathered(found, chosen.shape)
