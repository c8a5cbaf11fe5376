"""Tests of times that are measured side by side."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from selfkd.deployment import latency
from selfkd.deployment.latency import speed_up, time_together


class Clock:
    """A clock that calls set on."""

    def __init__(self):
        self.now, self.called = 0.0, []

    def call(self, name, ms):
        def run():
            self.called.append((name, torch.get_num_threads()))
            self.now += ms / 1000

        return run


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(latency, "_now", lambda: clock.now)
    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock.now)
    return clock


def test_each_round_has_every_call(clock):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        times = time_together(
            {"short": clock.call("short", 0.25), "long": clock.call("long", 50.0)}, rounds=8
        )
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert {name: len(own) for name, own in times.items()} == {"short": 8, "long": 8}
    np.testing.assert_allclose(times["short"], 0.25)
    np.testing.assert_allclose(times["long"], 50.0)
    counts = Counter(name for name, _ in clock.called)
    assert counts == {"short": 2 + 8 * 5, "long": 2 + 8}  # 2 to warm up; one more before 4 of 1 ms
    assert {number for _, number in clock.called} == {1}
    order = [name for name, _ in clock.called[4:]]
    assert order[:6] == ["short"] * 5 + ["long"]
    assert order[6:12] == ["long"] + ["short"] * 5


def test_rounds_end_with_the_budget_but_not_before_the_sixth(clock):
    calls = {"a": clock.call("a", 100.0), "b": clock.call("b", 100.0)}
    assert len(time_together(calls, budget=2.0)["a"]) == 8
    assert len(time_together(calls, budget=0.1)["a"]) == 6


def test_threads_are_put_back_after_a_failure():
    def fail():
        raise ValueError("broken")

    threads = torch.get_num_threads()
    with pytest.raises(ValueError, match="broken"):
        time_together({"a": fail})
    assert torch.get_num_threads() == threads


def test_speed_up_is_paired_and_not_moved_by_outliers():
    rng = np.random.default_rng(0)
    load = rng.uniform(1, 10, 40)  # shared by the rounds
    reference, other = 2 * load, load * rng.uniform(0.98, 1.02, 40)
    other[:5] *= 100
    found = speed_up(reference, other)
    assert found.value == pytest.approx(2, rel=0.02)
    assert found.low == pytest.approx(2, rel=0.03)
    assert found.high == pytest.approx(2, rel=0.03)


def test_interval_holds_the_median_with_95_percent():
    rng = np.random.default_rng(0)
    draws = rng.exponential(1, (2000, 20))
    found = [speed_up(draw, np.ones(20)) for draw in draws]
    held = np.mean([interval.low <= np.log(2) <= interval.high for interval in found])
    assert 0.945 < held < 0.975


@pytest.mark.parametrize("number", [1, 5])
def test_few_rounds_have_no_interval(number):
    found = speed_up([3.0] * number, [1.0] * number)
    assert (found.value, found.low, found.high) == (3.0, None, None)


def test_rounds_must_be_paired():
    with pytest.raises(ValueError, match="shorter"):
        speed_up([1.0, 2.0], [1.0])
