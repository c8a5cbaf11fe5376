"""The average of an ensemble's logits against SciPy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp, softmax
from torch import Tensor

from selfkd.losses import ensemble_logits

WEIGHTS = [0.5, 0.3, 0.2]


def make_logits(members: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(members, 40, 10, generator=torch.Generator().manual_seed(members))


@pytest.mark.parametrize("members", [1, 2, 5])
@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 3.0, 30.0, 1000.0, 1e30])
def test_mean_probabilities_are_scipys(members: int, scale: float) -> None:
    logits = make_logits(members, scale)
    found = ensemble_logits(logits)
    wide = logits.double().numpy()
    np.testing.assert_allclose(found.exp(), softmax(wide, axis=2).mean(axis=0), atol=1e-6)
    expected = logsumexp(log_softmax(wide, axis=2), axis=0) - np.log(members)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.exp().sum(1), 1, atol=1e-5)


def test_weighted_means_are_numpys() -> None:
    logits = make_logits(3)
    wide = logits.double().numpy()
    expected = np.average(softmax(wide, axis=2), axis=0, weights=WEIGHTS)
    np.testing.assert_allclose(ensemble_logits(logits, weights=WEIGHTS).exp(), expected, atol=1e-6)
    expected = np.average(wide, axis=0, weights=WEIGHTS)
    found = ensemble_logits(logits, average="logits", weights=WEIGHTS)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_mean_is_over_members() -> None:
    sure, unsure = torch.tensor([[[20.0, 0.0]], [[0.0, 0.0]]])
    mean = ensemble_logits(torch.stack([sure, unsure])).exp()
    np.testing.assert_allclose(mean, [[0.75, 0.25]], atol=1e-6)  # not that of mean logits: [1, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_averaged_in_float32(dtype: torch.dtype) -> None:
    members = make_logits(2).to(dtype)
    assert torch.equal(ensemble_logits(members), ensemble_logits(members.float()))
