"""Summaries of deployments as `selfkd.deploy` writes them, made by hand."""

from __future__ import annotations

from typing import Any

from selfkd.results import DeployRow, DeploySummary, Facts, Interval, McNemar, Timing

IMAGES = Facts(items={"train": 1000, "val": 300, "test": 360})
TEXT = Facts(
    items={"test": 20_000},
    unit="tokens",
    metric="nll",
    mode="min",
    further=("perplexity", "bits_per_byte"),
)
SEEDS = (1, 2, 3)


def timings(*found: tuple[int, float, float | None]) -> tuple[Timing, ...]:
    """Return times of batches: items, milliseconds and how many times as fast as float."""
    return tuple(
        Timing(
            items=items,
            ms=ms,
            speed_up=None if speed is None else Interval(speed, 0.95 * speed, 1.05 * speed),
        )
        for items, ms, speed in found
    )


def row(key: str, title: str, accuracy: float, **rest: Any) -> DeployRow:
    """Return a row of a model of images."""
    metrics = {"val_accuracy": accuracy, "test_accuracy": accuracy, "test_nll": 0.12}
    return DeployRow(key=key, title=title, metrics=metrics, **rest)


FLOAT = row(
    "float",
    "ONNX float",
    0.95,
    bytes=100_000,
    agreement=1.0,
    parameters=24_100,
    timings=timings((1, 0.035, None), (128, 1.92, None)),
)
TORCH = row("torch", "torch", 0.95, timings=timings((1, 0.61, 0.057), (128, 3.0, 0.64)))
INT8 = row(
    "int8",
    "ONNX int8",
    0.94,
    bytes=27_000,
    agreement=0.9972,
    timings=timings((1, 0.018, 1.9), (128, 0.6, 3.2)),
    mcnemar=McNemar(only_student=1, only_teacher=4, p=0.375),
    difference=Interval(-0.01, -0.02, 0.004),
    operators={"Conv": 3, "Gemm": 1},
)


def tuned(key: str, title: str, *values: float, **rest: Any) -> DeployRow:
    """Return a row of a model that was trained on the first seeds."""
    mean = sum(values) / len(values)
    timed = timings((1, 0.02, 1.7), (128, 0.7, 2.7))
    return row(
        key, title, mean, bytes=26_000, timings=timed, seeds=SEEDS[: len(values)], values=values,
        **rest,
    )  # fmt: skip


PRUNED = (
    tuned("pruned_labels", "pruned, labels", 0.93, 0.932, 0.928),
    tuned("pruned_distilled", "pruned, distilled", 0.94, 0.941, 0.939),
    tuned("fresh", "fresh of that size", 0.92, 0.922, 0.918),
)
ENSEMBLE = row(
    "ensemble",
    "ensemble of 4",
    0.96,
    bytes=400_000,
    timings=timings((1, 0.12, 0.25), (128, 7.7, 0.25)),
    mcnemar=McNemar(only_student=5, only_teacher=1, p=0.22),
)


def deployment(*rows: DeployRow, **changed: Any) -> DeploySummary:
    """Return a summary of rows: those of torch, float and int8 where none are given."""
    known: dict[str, Any] = {
        "model": "abc123",
        "title": "generation 3",
        "metric": "accuracy",
        "options": {"max_drop": 0.5},
        "rows": rows or (TORCH, FLOAT, INT8),
        "served": "int8",
        "files": {"float.onnx": "deploy/float.onnx", "int8.onnx": "deploy/int8.onnx"},
        "drop": 0.2,
        "cpu": "a processor with avx512_vnni",
        "versions": {"onnxruntime": "1.32.0"},
    }
    return DeploySummary(**known | changed)


def text_deployment() -> DeploySummary:
    """Return the summary of a language model."""

    def of(key: str, title: str, nll: float, **rest: Any) -> DeployRow:
        metrics = {"val_nll": nll, "test_nll": nll, "test_perplexity": 5.2}
        return DeployRow(key=key, title=title, metrics=metrics, **rest)

    return deployment(
        of(
            "float",
            "ONNX float",
            1.65,
            bytes=3_600_000,
            timings=timings((1, 1.7, None)),
            tokens_a_second=18_600,
        ),
        of(
            "int8",
            "ONNX int8",
            1.656,
            bytes=1_050_000,
            timings=timings((1, 1.1, 1.5)),
            tokens_a_second=29_200,
            difference=Interval(0.006, 0.004, 0.008),
        ),
        metric="nll",
    )
