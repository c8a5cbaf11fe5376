"""What is reproduced: the published figure, the band to be met, and whether a stored result does.

A judgement reads nothing but a result file (`results/<run>.json`, written by `run.py`), so anybody
can check it again without training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]
Outcome = Literal["met", "negative result", "missed", "reported"]


@dataclass(frozen=True)
class Judgement:
    """What was measured and what it comes to."""

    measured: str
    outcome: Outcome
    remark: str = ""


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """A published result and what counts as reproducing it."""

    key: str
    title: str
    run: str
    """Name of its config in `tune_configs/anchors`, its run folder and its result file."""
    published: str
    accept: str
    judge: Callable[[Row], Judgement]


@dataclass(frozen=True, kw_only=True)
class Run:
    """How a result comes about."""

    name: str
    command: str
    teacher: str = ""
    """The run whose model is its teacher."""
    train: str = ""
    """A training function of its own, in this folder."""


def load(name: str) -> Row:
    """Return the stored result of a run."""
    result: Row = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result


def errors(result: Row, arm: str) -> np.ndarray:
    """Return the test errors of an arm of a study, one a seed."""
    return np.array([row["test_errors"] for row in _arm(result, arm)["runs"]], dtype=float)


def _arm(result: Row, name: str) -> Row:
    row: Row = next(arm for arm in result["summary"]["arms"] if arm["name"] == name)
    return row


def mean_std(values: Sequence[float] | np.ndarray, form: str = "{:.1f}") -> str:
    """Return mean ± standard deviation over seeds."""
    mean = form.format(np.mean(values))
    return mean if len(values) < 2 else f"{mean} ± {form.format(np.std(values, ddof=1))}"


def standard_errors(values: np.ndarray, others: np.ndarray) -> float:
    """Return the paired mean difference in its standard errors."""
    difference = values - others
    spread = float(np.std(difference, ddof=1)) / len(difference) ** 0.5
    return (
        float(difference.mean()) / spread if spread else float("inf") * np.sign(difference.mean())
    )


def _met(condition: bool, *, otherwise: Outcome = "missed") -> Outcome:
    return "met" if condition else otherwise


def judge_a1(result: Row) -> Judgement:
    (generation,) = result["summary"]["generations"]
    found = round((1 - generation["test_accuracy"]) * result["test_items"])
    epochs = result["config"]["train.epochs"]
    remark = "" if found <= 75 else "the stretch of 75 is not reached"
    return Judgement(
        f"{found}, one seed, {epochs} epochs", _met(found <= 90 and epochs >= 60), remark
    )


def judge_a2(result: Row) -> Judgement:
    found = errors(result, "labels")
    return Judgement(mean_std(found), _met(125 <= found.mean() <= 195))


def judge_a3(result: Row) -> Judgement:
    labels, distilled = errors(result, "labels"), errors(result, "distilled")
    share = _closed(result, labels.mean(), distilled.mean())
    met = distilled.mean() <= 105 and share >= 0.7
    remark = (
        "" if distilled.mean() <= 85 and share >= 0.85 else "the stretch (85, 85 %) is not reached"
    )
    (contrast,) = result["summary"]["contrasts"]
    ends = contrast["share"]  # Fieller's 95 % interval
    between = f"[{ends['low']:.0%}, {ends['high']:.0%}]"
    return Judgement(
        f"{mean_std(distilled)}, {share:.0%} {between} of the gap closed", _met(met), remark
    )


def _closed(result: Row, labels: float, distilled: float) -> float:
    teacher = result["summary"]["members"]["test_errors"]
    return (labels - distilled) / (labels - teacher)


def judge_a3b(result: Row) -> Judgement:
    by_hand = load("a02_a03_student")
    row = result["summary"]["rows"][-1]
    images = by_hand["summary"]["items"]
    found = np.round((1 - np.array(row["runs"])) * images)
    others = errors(by_hand, "distilled")[: len(found)]  # of the same seeds
    more = standard_errors(found, others)
    point = result["summary"]["chosen"]["point"]
    setting = f"T {point['distill.temperature']:.3g}, alpha {point['distill.alpha']:.2f}"
    return Judgement(
        f"{mean_std(found)} with {setting}; by hand {mean_std(others)}",
        _met(more < 2),
        f"the paired difference is {found.mean() - others.mean():+.1f} errors, {more:+.1f} "
        "standard errors",
    )


def judge_a4_wide(result: Row) -> Judgement:
    means = {t: errors(result, f"units_300_t_{t}").mean() for t in (8, 12, 20)}
    spread = max(means.values()) - min(means.values())
    each = ", ".join(f"T {t}: {mean_std(errors(result, f'units_300_t_{t}'))}" for t in means)
    return Judgement(f"{each}; spread of means {spread:.1f}", _met(spread <= 12))


def judge_a4_narrow(result: Row) -> Judgement:
    arms = {
        t: errors(result, f"units_30_t_{t.replace('.', '_')}")
        for t in ("1", "2.5", "3", "4", "8", "20")
    }
    best = min(("2.5", "3", "4"), key=lambda t: arms[t].mean())
    gains = {t: standard_errors(arms[t], arms[best]) for t in ("1", "20")}
    each = ", ".join(f"T {t}: {mean_std(values)}" for t, values in arms.items())
    return Judgement(
        each,
        _met(all(gain >= 2 for gain in gains.values()), otherwise="negative result"),
        f"T {best} has fewer errors than T 1 by {gains['1']:.1f} standard errors, than T 20 by "
        f"{gains['20']:.1f}",
    )


def judge_a5(result: Row) -> Judgement:
    runs = _arm(result, "no_three")["runs"]
    threes = [row["unseen"]["class_accuracy"][3] for row in runs]
    biased = [row["unseen"]["biased_class_accuracy"][3] for row in runs]
    before, after = (
        [row["test_errors"] for row in rows] for rows in (runs, [r["unseen"] for r in runs])
    )
    met = np.mean(biased) >= 0.95 and np.mean(after) <= 160
    return Judgement(
        f"{mean_std(before)} errors, {np.mean(threes):.1%} of the threes right; with the bias "
        f"{mean_std(after)} and {np.mean(biased):.1%}",
        _met(bool(met)),
    )


def judge_a6(result: Row) -> Judgement:
    runs = _arm(result, "sevens_and_eights")["runs"]
    images = result["summary"]["items"]
    before = np.array([row["test_errors"] for row in runs]) / images
    one = np.array([row["unseen"]["test_errors"] for row in runs]) / images
    after = np.array([row["unseen"]["all_biased"]["test_errors"] for row in runs]) / images
    met = after.mean() <= 0.2 and after.mean() <= before.mean() / 2
    return Judgement(
        f"{mean_std(before, '{:.1%}')} → {mean_std(after, '{:.1%}')}",
        _met(bool(met)),
        f"with biases of all classes; one for 7 and 8 together leaves {mean_std(one, '{:.1%}')}",
    )


def judge_a7(result: Row) -> Judgement:
    teacher = errors(result, "smoothed_teacher")[0]
    plain, smoothed = errors(result, "of_plain_teacher"), errors(result, "of_smoothed_teacher")
    more = standard_errors(smoothed, plain)
    members = result["summary"]["members"]["test_errors"]
    return Judgement(
        f"teacher {members:.0f} → {teacher:.0f}; student {mean_std(plain)} → {mean_std(smoothed)}",
        _met(more >= 2, otherwise="negative result"),
        f"the student of the smoothed teacher has {more:+.1f} standard errors more errors",
    )


def judge_a8(result: Row) -> Judgement:
    full, hard, soft = (errors(result, name) for name in ("all_hard", "few_hard", "few_soft"))
    share = (hard.mean() - soft.mean()) / (hard.mean() - full.mean())
    return Judgement(
        f"all data {mean_std(full)}, 1,800 hard {mean_std(hard)}, 1,800 soft {mean_std(soft)}: "
        f"{share:.0%} of the gap closed",
        _met(share >= 0.4),
        f"all data has {len(full)} seeds, the others {len(hard)}",
    )


def judge_a9(result: Row) -> Judgement:
    summary, images = result["summary"], result["test_items"]
    rows = {row["name"]: row for row in summary["rows"]}
    labels, distilled = (
        np.round((1 - np.array(rows[name]["runs"])) * images)
        for name in ("student, labels only", "student, from its teacher")
    )
    ensemble = next(row for name, row in rows.items() if name.startswith("ensemble"))
    share = summary["share"]["value"]
    more = standard_errors(labels, distilled)
    whole = (1 - ensemble["test_accuracy"]) * images
    return Judgement(
        f"single {mean_std(labels)}, ensemble of ten {whole:.0f}, student {mean_std(distilled)}: "
        f"{share:.0%} kept",
        _met(share >= 0.4 and more >= 2),
        f"the student has {more:.1f} standard errors fewer errors than a single",
    )


def judge_a10(result: Row) -> Judgement:
    arms = sorted(result["summary"]["arms"], key=lambda arm: arm["name"])
    agreements = {arm["name"]: np.array([r["agreement"] for r in arm["runs"]]) for arm in arms}
    each = list(agreements.values())
    steps = [standard_errors(later, earlier) for earlier, later in pairwise(each)]
    text = ", ".join(
        f"{int(name.rpartition('_')[2]):,}: {mean_std(values, '{:.2%}')}"
        for name, values in agreements.items()
    )
    return Judgement(f"by images: {text}", _met(all(step > -2 for step in steps)))


def judge_a14(result: Row) -> Judgement:
    names = [f"generation_{number}" for number in range(4)]
    found = {name: errors(result, name) for name in names}
    ensemble = errors(result, "ensemble_of_3")
    best = min(names[1:], key=lambda name: found[name].mean())
    gains = [standard_errors(found[before], found[name]) for before, name in pairwise(names)]
    images = result["summary"]["items"]
    each = ", ".join(mean_std(100 - 100 * found[name] / images, "{:.2f}") for name in names)
    more = standard_errors(found[best], ensemble)
    steps = ", ".join(f"{gain:+.1f}" for gain in gains)
    return Judgement(
        f"accuracy of generations 0 to 3: {each} %; ensemble of 1 to 3: "
        f"{mean_std(100 - 100 * ensemble / images, '{:.2f}')} %",
        _met(bool(ensemble.mean() < found[best].mean())),
        f"each generation's gain over the one before, in standard errors: {steps}; of the ensemble "
        f"over the best generation: {more:+.1f}",
    )


def judge_a16(result: Row) -> Judgement:
    images, first = result["summary"]["items"], errors(result, "generation_0")
    arms = {
        "generation 1": "generation_1",
        "label smoothing": "label_smoothing",
        "DKPP": "dkpp",
        "CWTM": "cwtm",
        "poor teacher": "of_poor_teacher",
    }
    each = []
    for title, name in arms.items():
        found = errors(result, name)
        gain = 100 * (first - found).mean() / images
        each.append(f"{title} {gain:+.2f} ({standard_errors(first, found):+.1f})")
    text = "points over generation 0 (in standard errors): " + ", ".join(each)
    return Judgement(text, "reported")


def judge_a17(result: Row) -> Judgement:
    rows = result["summary"]["closed_form"]
    difference = max(row["difference"] for row in rows)
    errors = [row["test_mse"] for row in rows]
    lowest = int(np.argmin(errors))
    inside = 0 < lowest < len(errors) - 1
    return Judgement(
        f"largest difference {difference:.1e}; test MSE {errors[0]:.4f}, lowest "
        f"{errors[lowest]:.4f} in generation {lowest}, {errors[-1]:.4f} in generation "
        f"{len(errors) - 1}",
        _met(difference <= 1e-8 and inside),
    )


RUNS = (
    Run(name="a01_teacher", command="generations"),
    Run(name="a02_a03_student", command="study", teacher="a01_teacher"),
    Run(name="a03b_searched", command="ensemble", teacher="a01_teacher"),
    Run(name="a04_temperature", command="study", teacher="a01_teacher"),
    Run(name="a05_mythical_digit", command="study", teacher="a01_teacher"),
    Run(name="a06_sevens_and_eights", command="study", teacher="a01_teacher"),
    Run(name="a07_smoothed_teacher", command="study", teacher="a01_teacher"),
    Run(name="a08_few_images", command="study", teacher="a01_teacher"),
    Run(name="a09_ensemble", command="ensemble"),
    Run(name="a10_agreement", command="study", teacher="a01_teacher"),
    Run(name="a14_mnist_mlp", command="study"),
    Run(name="a14_mnist_mlp_jittered", command="study"),
    Run(name="a14_digits_cnn", command="study"),
    Run(name="a14_digits_resnet8", command="study"),
    Run(name="a14_digits_resnet20", command="study"),
    Run(name="a17_ridge", command="generations", train="a17_ridge.py:train_ridge"),
)
ANCHORS = (
    Anchor(
        key="A1",
        title="teacher 2x1200, dropout, jitter",
        run="a01_teacher",
        published="67 errors",
        accept="≤ 90 after at least 60 epochs (stretch ≤ 75)",
        judge=judge_a1,
    ),
    Anchor(
        key="A2",
        title="student 2x800, labels only",
        run="a02_a03_student",
        published="146 errors",
        accept="125 to 195",
        judge=judge_a2,
    ),
    Anchor(
        key="A3",
        title="the same from the teacher, T = 20",
        run="a02_a03_student",
        published="74 errors",
        accept="≤ 105 and ≥ 70 % of the gap closed (stretch ≤ 85, 85 %)",
        judge=judge_a3,
    ),
    Anchor(
        key="A3b",
        title="T and alpha searched",
        run="a03b_searched",
        published="–",
        accept="not worse than A3 (2 standard errors)",
        judge=judge_a3b,
    ),
    Anchor(
        key="A4, 300",
        title="temperature, 300 units",
        run="a04_temperature",
        published="flat above T = 8",
        accept="spread of means ≤ 12 errors",
        judge=judge_a4_wide,
    ),
    Anchor(
        key="A4, 30",
        title="temperature, 30 units",
        run="a04_temperature",
        published="T from 2.5 to 4 best",
        accept="best of 2.5, 3, 4 beats T = 1 and T = 20 by 2 standard errors",
        judge=judge_a4_narrow,
    ),
    Anchor(
        key="A5",
        title="the mythical digit",
        run="a05_mythical_digit",
        published="206 errors, 86.8 % of the threes right; with the bias 109 and 98.6 %",
        accept="with the bias ≥ 95 % of the threes, ≤ 160 errors",
        judge=judge_a5,
    ),
    Anchor(
        key="A6",
        title="sevens and eights only",
        run="a06_sevens_and_eights",
        published="47.3 % → 13.2 %",
        accept="with the bias ≤ 20 % and at most half",
        judge=judge_a6,
    ),
    Anchor(
        key="A7",
        title="a label-smoothed teacher",
        run="a07_smoothed_teacher",
        published="error of teacher 0.67 → 0.59 %, of student 0.74 → 0.91 %",
        accept="student worse by 2 standard errors",
        judge=judge_a7,
    ),
    Anchor(
        key="A8",
        title="3 % of the data",
        run="a08_few_images",
        published="speech: 58.9 % all, 44.5 % hard, 57.0 % soft: 87 % of the gap",
        accept="≥ 40 % of the gap closed",
        judge=judge_a8,
    ),
    Anchor(
        key="A9",
        title="ten networks into one",
        run="a09_ensemble",
        published="speech: 86 % kept",
        accept="≥ 40 % kept, better than a single by 2 standard errors",
        judge=judge_a9,
    ),
    Anchor(
        key="A10",
        title="agreement with the teacher",
        run="a10_agreement",
        published="grows with the transfer set",
        accept="monotone within 2 standard errors",
        judge=judge_a10,
    ),
    *(
        Anchor(
            key=key,
            title=f"{title}, {what}",
            run=run,
            published=published,
            accept=accept,
            judge=judge,
        )
        for what, run in (
            ("MLP, 1,000 images of MNIST", "a14_mnist_mlp"),
            ("MLP, 1,000 jittered images of MNIST", "a14_mnist_mlp_jittered"),
            ("CNN, 200 digits", "a14_digits_cnn"),
            ("ResNet-8, 200 digits", "a14_digits_resnet8"),
            ("ResNet-20, 200 digits", "a14_digits_resnet20"),
        )
        for key, title, published, accept, judge in (
            (
                "A14",
                "born again",
                "gen 1 +0.05 to +0.5 points, then flat; ensemble better",
                "the ensemble of 3 generations is better than the best one",
                judge_a14,
            ),
            ("A16", "controls", "all help a little", "reported", judge_a16),
        )
    ),
    Anchor(
        key="A17",
        title="ridge regression, closed form",
        run="a17_ridge",
        published="exact (Mobahi et al., 2020)",
        accept="matched to 1e-8, error U-shaped over rounds",
        judge=judge_a17,
    ),
)
