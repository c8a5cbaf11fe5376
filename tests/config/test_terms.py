"""Further terms in a config: their weights as keys, what is searched, what they cannot go with."""

from __future__ import annotations

import pytest

from selfkd.config import Config, get, load_config
from selfkd.config.validate import check_study
from selfkd.errors import ConfigError

HINT = {"name": "hint", "student": "a", "weight": 2.0}
TERMS = "distill.terms=[{name: hint, student: a, weight: 2}, {name: pkt}]"
TWICE = "distill.terms=[{name: hint, student: a}, {name: hint, student: b}]"
CHOICE = "{distill.terms: {choice: [[{name: hint, student: a}], [{name: pkt}], []]}%s}"


def test_the_weight_of_a_term_is_a_key() -> None:
    config = load_config(settings=[TERMS, "distill.terms.pkt.weight=3"])
    assert [term.weight for term in config.distill.terms] == [2, 3]
    assert [get(config, f"distill.terms.{name}.weight") for name in ("hint", 1, 2)] == [2, 3, None]
    at = config.at({"distill.terms.hint.weight": 0.5})
    assert [(term.name, term.weight) for term in at.distill.terms] == [("hint", 0.5), ("pkt", 3)]
    assert config.distill.terms[0].weight == 2
    twice = load_config(settings=[TWICE, "distill.terms.1.weight=3"])
    assert [term.weight for term in twice.distill.terms] == [1, 3]


def test_a_weight_has_no_effect_where_its_term_is_not_chosen() -> None:
    point = {"distill.terms.hint.weight": 0.5, "distill.terms": [HINT]}
    assert Config().at(point).distill.terms[0].weight == 0.5
    assert Config().at({**point, "distill.terms": []}).distill.terms == []


@pytest.mark.parametrize(
    ("terms", "live", "cached"),
    [
        ("[]", False, True),
        ("[{name: pkt}]", False, True),
        ("[{name: pkt, student: a}]", True, False),
    ],
)
def test_layers_need_the_teacher_live(terms: str, live: bool, cached: bool) -> None:
    config = load_config(settings=[f"distill.terms={terms}"])
    assert (config.distill.runs_teacher, config.reads_cache) == (live, cached)
    assert not load_config(settings=[f"distill.terms={terms}", "distill.live=true"]).reads_cache


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["distill.terms=[{name: hints}]"], r"terms\.0: name must be .*did you mean hint\?"),
        (["distill.terms=[{weight: 1}]"], r"^--set: distill\.terms\.0\.name: must be given$"),
        (["data.transfer={weight: 0.5}"], r"^--set: data\.transfer\.name: must be given$"),
        (
            ["distill.terms=[{name: dkd, args: {temperature: warm}}]"],
            r"args\.temperature of dkd must be a number, got 'warm'",
        ),
        (["distill.terms=[{name: dkd, args: {temperature: true}}]"], "a number, got True"),
        (
            ["distill.terms=[{name: crd, student: a, args: {negatives: 2.5}}]"],
            r"args\.negatives of crd must be a whole number, got 2\.5",
        ),
        (
            ["distill.terms=[{name: crd, student: a, args: {labels: 1}}]"],
            r"args\.labels of crd must be true or false, got 1",
        ),
        (["distill.terms=[{name: pkt, weight: 0}]"], "must have a weight above 0, got 0 for all"),
        (["distill.terms=[{name: pkt, weight: -1}]"], r"weight: must be greater than .* got -1"),
        ([TERMS, "distill.terms.rkd.weight=1"], r"of a term of distill\.terms \(hint, pkt\), got"),
        ([TWICE, "distill.terms.hint.weight=1"], "hint stands several times: 0 or 1 in its place"),
        (["distill.terms=[{name: pkt}]", "targets.top_k=3"], "pkt need all logits.*targets.top_k"),
        ([TERMS, "members.source=specialists"], "must be of logits with specialists.*got hint"),
        ([TERMS, "controls=[dkpp]"], "controls: dkpp has no further terms"),
        ([TERMS, "task=text", "distill.mode=traces"], "terms: has no effect with.* traces"),
        (
            ["distill.terms=[{name: crd, student: a}]", "task=text"],
            "other losses with task text, got crd, which compares one vector an item",
        ),
        (
            [f"search.space={CHOICE % ', distill.terms.rkd.weight: {uniform: [0, 1]}'}"],
            r"search\.space\.distill\.terms\.rkd\.weight: must be of a term",
        ),
        (
            ["search.space={distill.terms: {choice: [[{name: dkd, args: {a: 1}}]]}}"],
            r"search\.space\.distill\.terms: .*args must be those of dkd, got 'a'",
        ),
    ],
)
def test_what_terms_cannot_be_or_go_with_is_refused(settings: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(settings=settings)


def test_a_fault_of_both_ends_of_a_range_is_said_once() -> None:
    space = "search.space={distill.terms.rkd.weight: {uniform: [0, 1]}}"
    with pytest.raises(ConfigError) as error:
        load_config(settings=["distill.terms=[{name: pkt}]", space])
    assert len(str(error.value).splitlines()) == 1


def test_terms_and_their_weights_are_searched_together() -> None:
    more = ", distill.terms.hint.weight: {loguniform: [0.1, 10]}"
    config = load_config(settings=[f"search.space={CHOICE % more}"])
    assert config.reads_cache
    assert [key for key in config.space(with_teacher=True)] == [
        "distill.terms",
        "distill.terms.hint.weight",
    ]
    assert not config.space(with_teacher=False)


def test_an_arm_may_have_terms_but_not_of_transformed_targets() -> None:
    arms = "labels: {}, hint: {teacher: labels, set: {distill.terms: [{name: pkt}]}%s}"
    changed = arms % ", target_transform: permuted"
    check_study(load_config(settings=[f"study.arms={{{arms % ''}}}"]))
    with pytest.raises(ConfigError, match="target_transform permuted has no further terms"):
        check_study(load_config(settings=[f"study.arms={{{changed}}}"]))
