from dataclasses import replace

import pytest
from deployments import (
    ENSEMBLE,
    FLOAT,
    IMAGES,
    INT8,
    PRUNED,
    TEXT,
    TORCH,
    deployment,
    row,
    text_deployment,
    timings,
    tuned,
)

from selfkd.analysis.deploy import deploy_sentences, difference_of, shortfalls
from selfkd.results import Interval, McNemar


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, ""),
        ({"bytes": 100_000}, "not smaller"),
        ({"bytes": 130_000, "timings": timings((1, 1, 0.5), (128, 1, 0.9))}, "not smaller/faster"),
        ({"timings": timings((1, 1, 0.5), (128, 1, 2.0))}, "not faster at 1"),
        ({"timings": timings((1, 1, 1.04), (128, 1, 1.0))}, "not faster"),  # 1 is in the interval
        ({"timings": timings((1, 1, None))}, ""),
        ({"bytes": None}, ""),
    ],
)
def test_a_row_says_what_it_does_not_improve(changed, words):
    row = replace(INT8, **changed)
    assert shortfalls(row, deployment(FLOAT, row)) == words


def test_the_headline_says_size_speed_and_cost_and_the_next_line_what_it_stands_on():
    first, second, *_ = deploy_sentences(deployment(TORCH, FLOAT, INT8), IMAGES)
    assert first == (
        "generation 3 is served as ONNX int8: 0.27 of the float file's size; faster: 1.90x at "
        "batch 1 and 3.20x at batch 128; test accuracy -1.00 points: no evidence of a difference "
        "(McNemar p 0.38)"
    )
    assert second == (
        "ONNX int8: 0.27 of the float file's size; faster: 1.90x [1.80, 1.99] at batch 1 and "
        "3.20x [3.04, 3.36] at batch 128; test accuracy 94.00% (float 95.00%), -1.00 points "
        "[-2.00, +0.40]: no evidence of a difference on 360 test images (McNemar p 0.38); "
        "agreement 99.72%"
    )


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"timings": timings((1, 1, 0.5), (128, 1, 2.0))},
         "; faster: 2.00x at batch 128; not faster: 0.50x at batch 1; "),
        ({"timings": timings((1, 1, 0.5), (128, 1, 0.6))},
         "; not faster: 0.50x at batch 1 and 0.60x at batch 128; "),
        ({"bytes": 104_000}, "ONNX int8: not smaller, 1.04 of the float file's size"),
        ({"mcnemar": McNemar(only_student=0, only_teacher=9, p=0.004)},
         "more errors (McNemar p 0.004)"),
        ({"mcnemar": McNemar(only_student=9, only_teacher=0, p=0.004)},
         "fewer errors (McNemar p 0.004)"),
        ({"mcnemar": None}, "-1.00 points: no evidence of a difference"),
        ({"mcnemar": None, "difference": Interval(0.01, 0.004, 0.02)}, "+1.00 points: better"),
        ({"mcnemar": None, "difference": Interval(3e-5, 1e-5, 4e-5)},
         "+0.00 points: no difference in these digits"),
    ],
)  # fmt: skip
def test_the_headline_hides_no_shortfall(changed, words):
    row = replace(INT8, **changed)
    assert words in deploy_sentences(deployment(TORCH, FLOAT, row), IMAGES)[0]


def test_past_the_largest_drop_the_headline_says_that_there_is_no_file_and_why():
    files = {"float.onnx": "deploy/float.onnx"}
    lost = deployment(exceeded=True, drop=0.72, served="float", files=files)
    said = deploy_sentences(lost, IMAGES)
    assert said[0] == (
        "no int8.onnx of generation 3 is written: it is 0.72 points worse than the float model on "
        "validation, more than the 0.5 of deploy.max_drop"
    )
    assert any(line.startswith("ONNX int8: 0.27 of the float") for line in said)


def test_a_file_of_low_bits_past_the_largest_drop_is_said_beside_what_is_served():
    bits = row("bits4", "4-bit weights, ONNX", 0.90)
    lost = deployment(FLOAT, INT8, bits, exceeded=True, options={"bits": 4, "max_drop": 2.0})
    said = deploy_sentences(lost, IMAGES)
    assert said[0] == (
        "no int4.onnx of generation 3 is written: it is 5 points worse than the float model on "
        "validation, more than the 2 of deploy.max_drop"
    )
    assert said[1].startswith("generation 3 is served as ONNX int8: ")


def test_distillation_is_compared_with_labels_and_a_fresh_student_seed_by_seed():
    said = "\n".join(deploy_sentences(deployment(FLOAT, *PRUNED), IMAGES))
    assert "pruned, distilled is better than pruned, labels: +1.00 points [+0.31, +1.69]" in said
    assert "pruned, distilled is better than fresh of that size: +2.00 points" in said
    assert "\npruned, distilled: 0.26 of the float file's size; faster: 1.70x" in said
    assert "\npruned, labels: " not in said  # what it costs stands in the table


def test_one_seed_has_no_interval_and_no_evidence():
    rows = tuned("pruned_labels", "labels", 0.93), tuned("pruned_distilled", "distilled", 0.94)
    said = "\n".join(deploy_sentences(deployment(FLOAT, *rows), IMAGES))
    assert (
        "no evidence that distilled is better than labels (difference +1.00 points, 1 paired seed, "
        "so no interval)"
    ) in said


def test_the_ensemble_costs_what_a_single_student_does_not():
    said = deploy_sentences(deployment(FLOAT, INT8, ENSEMBLE), IMAGES)
    (line,) = (line for line in said if line.startswith("ensemble of 4"))
    assert line.startswith(
        "ensemble of 4 costs 4.00 times the size, 4.00 times the time at batch 1 and 4.00 times "
    )
    assert "no evidence of a difference on 360 test images (McNemar p 0.22)" in line


def test_a_language_model_has_its_interval_and_tokens_a_second():
    first, second, *_ = deploy_sentences(text_deployment(), TEXT)
    assert first.endswith("faster: 1.50x at batch 1; test NLL +0.006 nats: worse")
    assert "29,200 tokens a second (float 18,600)" in second
    assert "test NLL 1.656 nats (float 1.650 nats), +0.006 nats [+0.004, +0.008]: worse" in second


def test_machine_operators_and_remarks_are_said():
    row = replace(INT8, remarks=("not faster", "the first layer stays float"))
    said = deploy_sentences(deployment(TORCH, FLOAT, row, remarks=("2 heads pruned",)), IMAGES)
    assert said[2] == (
        "ONNX float is 17.5x as fast at batch 1 and 1.56x as fast at batch 128, compared with "
        "eager torch"
    )
    assert said[3] == "ONNX int8 computes in low precision: 3 Conv and 1 Gemm"
    kept = "ONNX int8 keeps 98.95 % of the float file's test accuracy at 27 % of its size"
    assert said[4] == kept
    assert said[5].endswith("on a processor with avx512_vnni; onnxruntime 1.32.0")
    assert said[6:] == ["ONNX int8: the first layer stays float", "2 heads pruned"]


def test_a_summary_of_the_float_file_alone_has_words():
    assert deploy_sentences(deployment(FLOAT, served="float", cpu="", versions={}), IMAGES) == [
        "generation 3 is served in float"
    ]


def test_seeds_that_differ_by_less_than_an_item_are_not_told_apart():
    accuracies = [FLOAT.metrics["test_accuracy"] + gain for gain in (0.001, 0.0011, 0.0012)]
    row = tuned("fresh", "fresh of that size", *accuracies)
    found = difference_of(row, deployment(FLOAT, row), IMAGES)
    assert found is not None
    assert found.low is not None
    assert found.low < 0  # one of the 360 test items is 0.0028
