"""Flags: those for common keys, and what an unknown one may mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from selfkd import capacity, deploy, ensemble, generations, study
from selfkd.cli.command import Command
from selfkd.cli.options import FLAGS, config_flags
from selfkd.config import load_config
from selfkd.config.schema import flat

COMMANDS = [generations, ensemble, capacity, study]
GIVEN = {
    "--task": ("images", "images"),
    "--data": ("mnist", "mnist"),
    "--data-root": ("d", "d"),
    "--labels": ("50", 50),
    "--model": ("selfkd_mlp", "selfkd_mlp"),
    "--epochs": ("3", 3),
    "--batch-size": ("8", 8),
    "--lr": ("1e-2", 0.01),
    "--trials": ("2", 2),
    "--seeds": ("4", 4),
    "--storage": ("s", "s"),
    "--name": ("n", "n"),
    "--seed": ("5", 5),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_the_same_flags_for_common_keys(command: Any) -> None:
    assert FLAGS.keys() == GIVEN.keys()
    words = [word for flag, (text, _) in GIVEN.items() for word in (flag, text)]
    arguments = command.make_parser().parse_args([*words, "--set", "train.epochs=9"])
    config = load_config(settings=arguments.settings, flags=config_flags(arguments))
    values = flat(config)
    assert {flag: values[key] for flag, (key, *_) in FLAGS.items()} == {
        flag: value for flag, (_, value) in GIVEN.items()
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--temperature", "4"], "did you mean --set distill.temperature=4 or "),
        (["--temperature=4"], "did you mean --set distill.temperature=4 or "),
        (["--label-smoothing", "0.1"], "did you mean --set train.label_smoothing=0.1?"),
        (["--weight_decay", "0"], "did you mean --set train.weight_decay=0?"),
        (["--train.lr", "0.1"], "did you mean --set train.lr=0.1?"),
        (["--optimiser", "adamw"], "did you mean --set train.optimizer=adamw?"),
        (["--gpus", "1"], "did you mean --set resources.gpu=1?"),
        (["--alpha"], "did you mean --set distill.alpha=…?"),
        (["--trails", "4"], "did you mean --trials"),
        (["--zzz", "4"], "--zzz: unknown flag\n--help lists the flags, --help-config KEY says"),
        (["word"], "unknown argument: word"),
    ],
)
def test_an_unknown_flag_names_what_it_may_mean(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        ensemble.main(words)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("error: ")
    assert "Traceback" not in error


def test_a_run_without_its_flag_is_told_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").touch()
    with pytest.raises(SystemExit):
        ensemble.main([str(tmp_path)])
    assert f"did you mean --from {tmp_path} or --resume" in capsys.readouterr().err


def test_seeds_of_a_deployment_are_those_of_its_fine_tuning() -> None:
    arguments = vars(deploy.make_parser().parse_args(["--seeds", "3"]))
    assert (arguments["deploy.seeds"], arguments["confirm.seeds"]) == (3, None)


def test_a_flag_that_is_no_number_is_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        study.main(["--epochs", "many"])
    assert caught.value.code == 2
    assert "argument --epochs: invalid int value: 'many'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "lineages"),
    [
        ([], 12),
        (["--rounds", "3", "--seed", "2", "--name", "x", "--storage", "s", "--plan"], 12),
        (["--set", "tracking=none", "--set", "resources.cpu=2"], 12),
        (["--seeds", "6"], 0),
        (["--labels", "200"], 0),
        (["--set", "confirm.seeds=3"], 0),
        (["--set", "model.args.width=64"], 0),
        (["--config", "tune_configs/mnist.yaml"], 0),
        (["--train", "x.py:f"], 0),
        (["--resume", "runs/x"], 0),
    ],
)
def test_the_default_job_alone_repeats_whole_lineages(
    words: list[str], lineages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags: dict[str, Any] = {}
    monkeypatch.setattr(Command, "main", lambda self, arguments, given: flags.update(given) or 0)
    assert generations.main(words) == 0
    assert flags.get("confirm.lineages", 0) == lineages
