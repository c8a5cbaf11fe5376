"""Settings of a task: its own defaults, and keys of another task refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from selfkd.config import Config, dump_config, from_tree, load_config, to_tree
from selfkd.config.validate import check_study
from selfkd.errors import ConfigError

FIRST = {"distill.temperature": 1.0, "distill.alpha": 1.0}


def test_text_has_defaults_of_its_own() -> None:
    config = load_config(flags={"task": "text"}, settings=["search.trials=2"])
    assert (config.search.metric, config.search.mode) == ("val_nll", "min")
    assert (config.distill.temperature, config.distill.alpha) == (1, 1)
    assert config.search.points == [FIRST]
    assert config.model.name == "selfkd_gpt"
    by_match = load_config(flags={"task": "text"}, settings=["search.metric=val_exact_match"])
    assert by_match.search.mode == "max"
    assert load_config(flags={"task": "text"}).search.points == [FIRST] * 3
    assert load_config() == Config()


def test_what_is_given_wins_in_any_order(tmp_path: Path) -> None:
    settings = ["search.space.train.lr={loguniform: [1e-3, 1e-1]}", "task=text", "train.lr=1e-3"]
    config = load_config(settings=settings)
    assert list(config.search.space) == ["distill.temperature", "distill.alpha", "train.lr"]
    assert config.search.space["distill.temperature"] == {"loguniform": [1, 2]}
    assert config.train.lr == 1e-3
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    assert load_config(file) == config
    assert from_tree(to_tree(config)) == config


def test_text_of_teachers_has_neither_temperature_nor_alpha() -> None:
    traces = load_config(flags={"task": "text"}, settings=["distill.mode=traces"])
    assert (traces.search.space, traces.search.points) == ({}, [])
    settings = ["search.space.train.lr={loguniform: [1e-3, 1e-1]}", "distill.mode=traces"]
    assert list(load_config(flags={"task": "text"}, settings=settings).search.space) == ["train.lr"]
    for wrong, where in (
        ("distill.temperature=2", "distill.temperature: "),
        ("distill.on_policy=0.5", "distill.on_policy: "),
        ("targets.top_k=8", "targets.top_k: "),
        ("search.space.distill.alpha={uniform: [0, 1]}", "search.space.distill.alpha: "),
        ("search.points=[{distill.alpha: 1.0}]", "search.points: distill.alpha "),
    ):
        with pytest.raises(ConfigError) as error:
            load_config(flags={"task": "text"}, settings=[wrong, "distill.mode=traces"])
        assert f"{where}has no effect with distill.mode traces" in str(error.value)


@pytest.mark.parametrize(
    ("task", "setting", "message"),
    [
        ("text", "data.crop=0.5", "data.crop: only with task images, got 0.5 with task text"),
        ("text", "data.classes=[0, 1]", "data.classes: only with task images"),
        ("text", "deploy.prune=0.5", "deploy.prune: only with task images, got 0.5"),
        ("text", "train.warmup_epochs=1", "train.warmup_epochs: only with task images"),
        ("images", "data.context=8", "data.context: only with task text"),
        ("images", "train.steps=8", "train.steps: only with task text"),
        ("images", "data.name=pydoc", "data.name: pydoc is only with task text: --task text"),
        ("images", "model.name=hf", "model.name: hf is only with task text: --task text"),
        ("images", "search.space={train.steps: {choice: [1, 2]}}", "train.steps is only with"),
        ("text", "search.points=[{train.momentum: 0.5}]", "points.0: train.momentum is only with"),
        ("text", "members.source=snapshots", "snapshots are only with task images"),
        ("text", "resources.workers=2", "resources.workers: must be 1 with task text"),
        ("text", "train.warmup_steps=300", "must be less than train.steps"),
        ("text", "search.points=[{train.steps: 2}]", "points.0: train.epochs: must be at most"),
        ("text", "search.space.train.steps={choice: [2]}", "train.epochs: must be at most"),
        ("text", "train.steps=31", "train.epochs: must be at most"),
        ("sound", "rounds=1", "task: must be 'images' or 'text', got 'sound'"),
    ],
)
def test_keys_of_another_task_are_refused_by_name(task: str, setting: str, message: str) -> None:
    more = ["train.epochs=40"] if "train.steps=31" in setting else []
    with pytest.raises(ConfigError) as error:
        load_config(flags={"task": task}, settings=[setting, *more])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["distill.on_policy=0.5"], "distill.on_policy: needs distill.live=true, as no teacher"),
        (["search.space.distill.on_policy={choice: [0, 1]}"], "distill.on_policy: needs distill"),
        (["search.points=[{distill.on_policy: 1}]"], "distill.on_policy: needs distill.live=true"),
        (
            ["search.points=[{distill.divergence: js}]", "targets.top_k=8"],
            "distill.divergence: must be forward_kl, got js, which needs all logits: leave out",
        ),
        (
            ["search.points=[{distill.average: logits}]", "targets.top_k=8"],
            "targets.top_k: cannot go with distill.average logits",
        ),
        (["distill.live=true", "targets.top_k=8"], "targets.top_k: not with distill.live=true"),
        (["distill.live=true", "targets.samples=8"], "targets.samples: not with distill.live=true"),
        (
            ["distill.divergence=js", "targets.top_k=8"],
            "distill.divergence: must be forward_kl, got js, which needs all logits: leave out",
        ),
        (
            ["search.space.distill.divergence={choice: [reverse_kl, js]}", "targets.samples=8"],
            "distill.divergence: must be forward_kl, got js, reverse_kl: targets.samples are drawn",
        ),
    ],
)
def test_a_loss_without_the_logits_it_takes_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(flags={"task": "text"}, settings=settings)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("distill.temperature=2", "distill.temperature: must be 1, got 2.0: targets.samples are"),
        (
            "search.points=[{distill.alpha: 1}, {distill.temperature: 2}]",
            "search.points.1.distill.temperature: must be 1, got 2",
        ),
        (
            "search.space.distill.temperature={uniform: [1, 3]}",
            "search.space.distill.temperature: must be left out, got {'uniform': [1, 3]}",
        ),
        ("distill.average=logits", "distill.average: must be probabilities, got logits"),
        ("search.points=[{distill.average: logits}]", "distill.average: must be probabilities"),
        (
            "study.arms={a: {}, b: {teacher: a, set: {distill.divergence: js}}}",
            "distill.divergence: must be forward_kl, got js: targets.samples are drawn",
        ),
        ("controls=[dkpp]", "controls: dkpp need all logits: targets.samples are drawn at T = 1"),
        ("targets.top_k=8", "targets.samples: cannot go with targets.top_k: give one of them"),
        ("targets.samples=0", "targets.samples: must be greater than or equal to 1, got 0"),
        (
            "study.arms={a: {}, b: {teacher: a, set: {distill.temperature: 2}}}",
            "study.arms.b.set.distill.temperature: must be 1, got 2",
        ),
    ],
)
def test_what_samples_cannot_go_with_is_refused(setting: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(flags={"task": "text"}, settings=["targets.samples=8", setting])
    assert message in str(error.value)


@pytest.mark.parametrize("more", [[], ["search.space.train.lr={choice: [0.01, 0.02]}"]])
def test_alpha_alone_is_searched_with_samples(more: list[str]) -> None:
    config = load_config(flags={"task": "text"}, settings=[*more, "targets.samples=8"])
    keys = {"distill.alpha", *(["train.lr"] if more else [])}
    assert config.search.space.keys() == keys
    assert config.search.points == ([] if more else [{"distill.alpha": 1.0}] * 3)
    assert from_tree(to_tree(config)) == config


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ("set: {train.steps: 2}", r"b.set: train.epochs: must be at most train.steps \(2\)"),
        (
            "target_transform: permuted, set: {distill.live: true}",
            r"b: permuted needs cached teacher logits of all classes: leave out distill.live",
        ),
        (
            "target_transform: hard, set: {distill.divergence: reverse_kl}",
            r"b: hard needs distill.divergence forward_kl, got reverse_kl: others are without",
        ),
        (
            "target_transform: confidence, set: {distill.mode: traces}",
            r"b: confidence needs .*: leave out distill.mode traces",
        ),
        (
            "set: {write.keep: right}",
            "b.set: write.keep: only with distill.mode traces, got 'right'",
        ),
        (
            "set: {distill.mode: traces, distill.live: true}",
            "b.set: distill.live: has no effect with distill.mode traces",
        ),
        (
            "set: {targets.samples: 4, distill.temperature: 2}",
            "b.set: targets.samples: only with distill.temperature 1, got 2",
        ),
        (
            "set: {train.init: teacher, model.args: {width: 8}}",
            r"b.set: train.init must be fresh where its teacher is another model",
        ),
    ],
)
def test_an_arm_is_checked_as_a_config_is(arm: str, message: str) -> None:
    arms = f"study.arms={{a: {{}}, b: {{teacher: a, {arm}}}}}"
    config = load_config(flags={"task": "text"}, settings=[arms])
    with pytest.raises(ConfigError, match=message):
        check_study(config)


def test_arms_may_cache_other_parts_of_the_logits() -> None:
    arms = "study.arms={a: {}, b: {teacher: a, set: {targets.samples: 4}}, c: {teacher: a}}"
    check_study(load_config(flags={"task": "text"}, settings=[arms]))
    wrong = load_config(settings=["study.arms={a: {}, b: {teacher: a, set: {targets.root: x}}}"])
    with pytest.raises(ConfigError, match="must be keys of model, train, distill, write or of"):
        check_study(wrong)


def test_an_arm_of_traces_may_stand_beside_another_temperature() -> None:
    arms = "study.arms={a: {}, b: {teacher: a, set: {distill.mode: traces, write.samples: 2}}}"
    config = load_config(flags={"task": "text"}, settings=[arms, "distill.temperature=2"])
    check_study(config)
    live = load_config(flags={"task": "text"}, settings=[arms, "distill.live=true"])
    with pytest.raises(ConfigError, match=r"b.set: distill.live: has no effect with distill"):
        check_study(live)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("data.crop: 0.5", "arms.a.set: data.crop is not with task text"),
        ("data.train_size: 5", "arms.a.set: data.train_size is only with data.name arithmetic or"),
    ],
)
def test_an_arm_has_keys_of_its_task_alone(key: str, message: str) -> None:
    config = load_config(flags={"task": "text"}, settings=[f"study.arms={{a: {{set: {{{key}}}}}}}"])
    with pytest.raises(ConfigError, match=message):
        check_study(config)
    own = load_config(
        flags={"task": "text"},
        settings=["data.name=arithmetic", "study.arms={a: {set: {data.train_size: 5}}}"],
    )
    check_study(own)
