"""Search spaces: distributions of config values, and proposers of points."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

Point = dict[str, Any]
KINDS = ("uniform", "loguniform", "randint", "choice")


def is_finite(value: float) -> bool:
    """Say whether a number is finite, also as a float: 10**400 is not."""
    return abs(value) <= sys.float_info.max


@dataclass(frozen=True)
class Distribution:
    """Distribution of one config value, given by its quantile function.

    Args:
        kind: `uniform` or `loguniform` over [low, high], `randint` over low..high (both included),
            or `choice` of any values.
        values: Bounds [low, high], or the choices.

    Raises:
        ValueError: The kind is unknown, or the range is empty or impossible.

    >>> Distribution("loguniform", (1, 100)).at(0.5)
    10.0
    >>> Distribution("choice", ("a", "b")).at(0.7)
    'b'
    """

    kind: Literal["uniform", "loguniform", "randint", "choice"]
    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"distribution must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.kind == "choice":
            if not self.values:
                raise ValueError("choice must have at least one value, got []")
            return
        if len(self.values) != 2 or not all(
            isinstance(value, int | float) and not isinstance(value, bool) and is_finite(value)
            for value in self.values
        ):
            raise ValueError(f"{self.kind} must be [low, high], got {list(self.values)}")
        low, high = self.values
        if not low < high:
            raise ValueError(f"{self.kind} must have low < high, got {list(self.values)}")
        if self.kind == "loguniform" and not low > 0:
            raise ValueError(f"loguniform must have low > 0, got {list(self.values)}")
        if self.kind == "randint" and not all(isinstance(value, int) for value in self.values):
            raise ValueError(f"randint must have whole numbers, got {list(self.values)}")

    @classmethod
    def parse(cls, spec: object) -> Distribution:
        """Parse `{kind: [values]}`, as written in YAML.

        Args:
            spec: Mapping with one entry.

        Raises:
            ValueError: The spec is no such mapping, or describes no distribution.

        >>> Distribution.parse({"uniform": [0, 1]})
        Distribution(kind='uniform', values=(0, 1))
        """
        if not isinstance(spec, Mapping) or len(spec) != 1:
            raise ValueError(f"a search space entry must be like {{uniform: [0, 1]}}, got {spec}")
        ((kind, values),) = spec.items()
        if not isinstance(values, Sequence) or isinstance(values, str):
            raise ValueError(f"{kind} must have a list of values, got {values}")
        return cls(kind, tuple(values))

    def at(self, quantile: float) -> Any:
        """Return the value at a quantile.

        Args:
            quantile: Number in [0, 1].
        """
        if self.kind == "choice":
            return self.values[min(int(quantile * len(self.values)), len(self.values) - 1)]
        low, high = self.values
        if self.kind == "randint":
            return min(low + int(quantile * (high - low + 1)), high)
        if self.kind == "uniform":
            value = low + quantile * (high - low)
        else:
            exact = math.exp(math.log(low) + quantile * (math.log(high) - math.log(low)))
            value = float(f"{exact:.12g}")
        return float(min(max(value, low), high))  # against rounding

    def quantile(self, value: float) -> float:
        """Return where a number lies in the range, the inverse of `at`; beyond [0, 1] outside it.

        >>> Distribution("loguniform", (1, 100)).quantile(10)
        0.5
        """
        low, high = self.values
        if self.kind == "loguniform":
            return math.log(value / low) / math.log(high / low) if value > 0 else -math.inf
        return float((value - low) / (high - low))

    def contains(self, value: Any) -> bool:
        """Return whether the distribution can take a value."""
        if self.kind == "choice":
            return value in self.values
        whole = self.kind != "randint" or value == int(value)
        return bool(whole and self.values[0] <= value <= self.values[1])


def make_points(
    space: Mapping[str, Distribution],
    *,
    count: int,
    algorithm: Literal["random", "sobol"],
    seed: int,
    first: Sequence[Point] = (),
) -> list[Point]:
    """Return the points of a search that does not depend on its outcomes.

    Args:
        space: Distributions by dotted config key.
        count: Number of points, those of `first` included.
        algorithm: `random` (independent draws) or `sobol` (scrambled Sobol sequence of
            `scipy.stats.qmc`).
        seed: Random seed of the draws.
        first: Points that come before all others, inside the space or not.

    Returns:
        `count` points; empty ones after the first where the space is empty.

    Reference:
        Owen, "Scrambling Sobol' and Niederreiter-Xing Points", Journal of Complexity, 1998,
        https://doi.org/10.1006/jcom.1998.0487

    >>> space = {"distill.alpha": Distribution("uniform", (0, 1))}
    >>> points = make_points(
    ...     space, count=3, algorithm="sobol", seed=0, first=[{"distill.alpha": 1}]
    ... )
    >>> points[0], len(points)
    ({'distill.alpha': 1}, 3)
    """
    points = [dict(point) for point in first][:count]
    rest = count - len(points)
    if not space or rest == 0:
        return points + [{}] * rest
    if algorithm == "random":
        quantiles = np.random.default_rng(seed).random((rest, len(space)))
    else:
        from scipy.stats import qmc  # slow to import

        sobol = qmc.Sobol(d=len(space), rng=seed)
        quantiles = sobol.random_base2(math.ceil(math.log2(rest)))[:rest]
    return points + [
        {key: space[key].at(float(q)) for key, q in zip(space, row, strict=True)}
        for row in quantiles
    ]


class Proposer(Protocol):
    """Proposer of the points of a search, trial by trial."""

    @property
    def limit(self) -> int | None:
        """Largest number of trials at a time; None where points do not depend on outcomes."""

    def ask(self, number: int) -> Point:
        """Return the point of a trial.

        Args:
            number: Number of the trial.
        """

    def tell(self, number: int, point: Point, value: float | None) -> None:
        """Receive the outcome of a trial.

        Args:
            number: Number of the trial.
            point: Point of the trial.
            value: Value to be maximised; None where the trial failed.
        """


class Points:
    """Proposer of given points: trial n gets the n-th, also after a resume.

    Args:
        points: Points, one for each trial.
    """

    limit = None

    def __init__(self, points: Sequence[Point]) -> None:
        self._points = points

    def ask(self, number: int) -> Point:
        """Return the point of a trial."""
        return self._points[number]

    def tell(self, number: int, point: Point, value: float | None) -> None:
        """Do nothing: the points are given."""


class Optuna:
    """Proposer by Optuna's TPE sampler.

    Args:
        space: Distributions by dotted config key.
        seed: Random seed of the sampler.
        first: Points that come before all others. Those outside the space are tried without the
            sampler, which knows nothing of them.

    Raises:
        ValueError: optuna is not installed.

    Reference:
        Bergstra et al., "Algorithms for Hyper-Parameter Optimization", 2011; Watanabe,
        "Tree-Structured Parzen Estimator", 2023, https://arxiv.org/abs/2304.11127
    """

    limit = 4  # so that each proposal knows most earlier outcomes

    def __init__(
        self, space: Mapping[str, Distribution], *, seed: int, first: Sequence[Point] = ()
    ) -> None:
        try:
            import optuna
        except ImportError:
            raise ValueError(
                "search.algorithm optuna needs optuna: pip install 'selfkd[optuna]'"
            ) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        make: dict[str, Any] = {
            "uniform": lambda low, high: optuna.distributions.FloatDistribution(low, high),
            "loguniform": lambda low, high: optuna.distributions.FloatDistribution(
                low, high, log=True
            ),
            "randint": lambda low, high: optuna.distributions.IntDistribution(low, high),
            "choice": lambda *values: optuna.distributions.CategoricalDistribution(values),
        }
        self._space = space
        with warnings.catch_warnings():  # that lists, as of terms, cannot be stored in a database
            warnings.filterwarnings("ignore", message="Choices for a categorical distribution")
            self._distributions = {key: make[d.kind](*d.values) for key, d in space.items()}
        self._failed = optuna.trial.TrialState.FAIL
        self._create_trial = optuna.trial.create_trial
        self._make_sampler: Any = optuna.samplers.TPESampler
        self._study = optuna.create_study(direction="maximize")
        self._seed, self._first = seed, first
        self._trials: dict[int, Any] = {}

    def ask(self, number: int) -> Point:
        """Return the point that the sampler proposes for a trial."""
        if number < len(self._first):
            if not self._has(self._first[number]):
                return dict(self._first[number])
            self._study.enqueue_trial(self._first[number])
        # one seed a trial, so that a resumed search does not repeat its first points
        self._study.sampler = self._make_sampler(seed=(self._seed + number) % 2**32)
        trial = self._study.ask(self._distributions)
        self._trials[number] = trial
        return dict(trial.params)

    def tell(self, number: int, point: Point, value: float | None) -> None:
        """Tell the sampler; a trial from before a resume is added to its study."""
        trial = self._trials.pop(number, None)
        failed = value is None or math.isnan(value)
        if trial is not None:
            self._study.tell(trial, None if failed else value, self._failed if failed else None)
        elif not failed and self._has(point):
            self._study.add_trial(
                self._create_trial(params=point, distributions=self._distributions, value=value)
            )

    def _has(self, point: Point) -> bool:
        """Say whether a point lies in the space: Optuna refuses others."""
        return point.keys() == self._space.keys() and all(
            self._space[key].contains(value) for key, value in point.items()
        )
