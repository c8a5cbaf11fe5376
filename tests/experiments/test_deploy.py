"""The recipe of deployment, in this process: real exports, real files."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from selfkd.config import load_config, to_tree
from selfkd.deploy import main
from selfkd.errors import ConfigError
from selfkd.execution.jobs import InProcess
from selfkd.experiments.arms import Run
from selfkd.experiments.deploy import deploy, finished
from selfkd.experiments.deploy_forms import Deployed, digest_of
from selfkd.experiments.deploy_tuning import _point
from selfkd.experiments.generations import born_again
from selfkd.experiments.run_folder import RunFolder
from selfkd.results import DeploySummary, Event, RunFinished, TaskStarted, TrialResult
from selfkd.storage.files import load_json
from selfkd.storage.rows import load_row
from selfkd.worker.deploy import _largest_difference
from selfkd.worker.jobs import run_job

SMALL = (
    "model={name: selfkd_cnn, args: {width: 4}}",
    "data.train_size=100",
    "data.val_size=50",
    "train.epochs=2",
    "search.trials=1",
    "confirm.seeds=0",
    "rounds=1",
    "deploy.calibration=64",
    "deploy.seeds=2",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two generations."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    config = load_config(settings=SMALL)
    run = Run(
        config=config,
        folder=RunFolder.create(folder, config),
        executor=InProcess(run_job),
        events=lambda event: None,
    )
    born_again(run)
    return folder


def run_on(folder: Path, *settings: str, events: list[Event] | None = None) -> Run:
    config = load_config(settings=[*SMALL, *settings])
    return Run(
        config=config,
        folder=RunFolder(folder),
        executor=InProcess(run_job),
        events=(events if events is not None else []).append,
    )


def best(folder: Path) -> Deployed:
    result = RunFolder(folder).results()[1]
    first = RunFolder(folder).results()[0]
    models = [first.models[0], result.models[0]]
    return Deployed(
        title="generation 1", model=result.models[0], point=result.point, ensemble=models
    )


@pytest.fixture(scope="module")
def deployed(trained: Path) -> tuple[Path, DeploySummary]:
    """The run with all that can be deployed of it."""
    run = run_on(trained, "deploy.prune=0.5", "deploy.bits=4", "deploy.ensemble=true")
    return trained, deploy(run, best(trained))


def test_every_form_has_a_row_with_its_measures(deployed: tuple[Path, DeploySummary]) -> None:
    folder, summary = deployed
    keys = [row.key for row in summary.rows]
    assert keys == [
        *("torch", "float", "int8", "pruned_labels", "pruned_distilled", "fresh"),
        *("pruned_float", "pruned_int8", "bits4_rounded", "bits4_labels", "bits4_distilled"),
        *("bits4", "ensemble"),
    ]
    for row in summary.rows:
        assert {"val_accuracy", "test_accuracy", "test_nll"} <= row.metrics.keys()
        assert [timing.items for timing in row.timings] == [1, 128]
        assert row.bytes is not None
        assert row.key == "torch" or row.agreement is not None
        if row.file is not None:
            assert (folder / row.file).stat().st_size == row.bytes
    assert summary.row("float").agreement == 1
    assert len(summary.row("pruned_distilled").values) == 2
    assert summary.row("int8").operators
    assert summary.point["distill.alpha"] <= 0.65
    assert load_row(DeploySummary, folder / "deploy" / "deploy.json") == summary


def test_files_of_what_is_served_lie_in_the_folder(deployed: tuple[Path, DeploySummary]) -> None:
    folder, summary = deployed
    assert set(summary.files) == {
        *("float.onnx", "int8.onnx", "int4.onnx", "ensemble.onnx", "model.safetensors"),
        "predict.py",
    }
    for file in summary.files.values():
        assert (folder / file).exists()
    served = summary.row(summary.served)
    assert served.key == "pruned_int8"
    assert (folder / "deploy" / "int8.onnx").read_bytes() == (
        folder / str(served.file)
    ).read_bytes()
    assert summary.network == {"name": "selfkd_cnn", "args": {"width": 2}}


def test_the_served_file_predicts_what_the_named_network_does(
    deployed: tuple[Path, DeploySummary],
) -> None:
    from selfkd.deployment.session import OnnxNetwork
    from selfkd.loading.model import load

    folder, _ = deployed
    inputs = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        logits = load(folder / "deploy" / "model.safetensors").model(inputs)
    torch.testing.assert_close(
        OnnxNetwork(folder / "deploy" / "float.onnx")(inputs), logits, rtol=1e-4, atol=1e-4
    )


def test_what_is_done_is_not_done_again(deployed: tuple[Path, DeploySummary]) -> None:
    folder, summary = deployed
    settings = "deploy.prune=0.5", "deploy.bits=4", "deploy.ensemble=true"
    run = run_on(folder, *settings)
    assert finished(run.config, run.folder, best(folder)) == summary
    events: list[Event] = []
    again = deploy(run_on(folder, *settings, events=events), best(folder))
    done = {event.title for event in events if isinstance(event, TaskStarted)}
    assert done <= {"deploy: caching teacher logits"}  # which finds them there
    assert isinstance(events[-1], RunFinished)
    assert again == summary


def test_a_damaged_file_is_made_again(deployed: tuple[Path, DeploySummary]) -> None:
    folder, summary = deployed
    file = folder / str(summary.row("int8").file)
    file.write_bytes(b"damaged")
    events: list[Event] = []
    deploy(run_on(folder, events=events), best(folder))
    assert [e.title for e in events if isinstance(e, TaskStarted)][:1] == ["ONNX int8: quantising"]
    assert file.stat().st_size == summary.row("int8").bytes
    for text in ("damaged", "[]", "null"):
        file.with_suffix(".json").write_text(text)
        deploy(run_on(folder), best(folder))
        assert load_json(file.with_suffix(".json"))["bytes"] == summary.row("int8").bytes
    run = run_on(folder)
    (folder / "deploy" / "int8.onnx").unlink()  # a link to the other
    (folder / "deploy" / "int8.onnx").write_bytes(b"damaged")
    assert finished(run.config, run.folder, best(folder)) is None


@pytest.mark.parametrize("drop", [0.7, math.nan])
def test_past_max_drop_there_is_no_int8_file(
    trained: Path, drop: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("selfkd.experiments.deploy.drop_of", lambda *arguments: drop)
    summary = deploy(run_on(trained, "deploy.max_drop=0.5"), best(trained))
    assert summary.exceeded
    assert summary.served == "float"
    assert "int8.onnx" not in summary.files
    assert not (trained / "deploy" / "int8.onnx").exists()
    assert (trained / "deploy" / "predict.py").read_text().count("FILE = 'float.onnx'") == 1
    monkeypatch.setattr("selfkd.deploy.recipe.finished", lambda *arguments: summary)
    assert main(["--from", str(trained), "--max-drop", "0.5", "--quiet"]) == 1
    assert "error: no int8.onnx of generation" in capsys.readouterr().out


def test_weights_that_are_no_numbers_are_refused(trained: Path, tmp_path: Path) -> None:
    from selfkd.storage.checkpoint import load_tensors, save_tensors

    source = best(trained)
    tensors, facts = load_tensors(trained / source.model.checkpoint)
    name = min(tensors)
    tensors[name].flatten()[0] = math.nan
    del facts["hash"]
    digest = save_tensors(trained / "nan.safetensors", tensors, facts)
    broken = replace(source.model, hash=digest, checkpoint="nan.safetensors")
    with pytest.raises(ConfigError, match=r"finite|NaN"):
        deploy(run_on(trained), replace(source, model=broken))


def test_another_model_than_the_run_wrote_down_is_refused(trained: Path) -> None:
    source = best(trained)
    other = replace(source.model, checkpoint=source.ensemble[0].checkpoint)
    with pytest.raises(ConfigError, match="must be the model of its run"):
        deploy(run_on(trained), replace(source, model=other))


def test_too_few_images_for_the_ranges_are_refused(trained: Path) -> None:
    payload = {
        "config": to_tree(load_config(settings=[*SMALL, "data.train_size=20"])),
        "members": run_on(trained).rows([best(trained).model]),
        "exported": str(trained / "deploy" / "float.onnx"),
        "path": str(trained / "none.onnx"),
        "calibration": 64,
    }
    (row,) = run_job("deploy_quantise", payload)
    assert "data.train_size must be at least 32" in row["fault"]
    assert not (trained / "none.onnx").exists()


def test_of_what_was_fine_tuned_those_stay_that_some_number_of_seeds_chooses(
    deployed: tuple[Path, DeploySummary],
) -> None:
    folder, _ = deployed
    arms = {path.parent.parent for path in folder.glob("deploy/*/*/trial_*/result.json")}
    names = ["bits4_distilled", "bits4_labels", "fresh", "pruned_distilled", "pruned_labels"]
    assert sorted(arm.name for arm in arms) == names
    for arm in arms:
        trials = [load_row(TrialResult, path) for path in sorted(arm.glob("*/result.json"))]
        assert {trial.stage for trial in trials} == {f"deploy_{arm.name}-{arm.parent.name[:8]}"}
        first, second = (trial.metrics["val_accuracy"] for trial in trials)
        there = [path.parent.name for path in sorted(arm.glob("*/student.safetensors"))]
        assert there == ["trial_000", "trial_001"][: 1 + (second > first)]
    trained = {result.models[0].hash for result in RunFolder(folder).results()}
    kept = {path.stem for path in (folder / "predictions").glob("*.safetensors")}
    assert kept <= trained


def test_a_deployment_that_was_killed_amid_its_files_is_not_finished(
    deployed: tuple[Path, DeploySummary], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = deployed

    def killed(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    whole = deploy(run_on(folder), best(folder))
    monkeypatch.setattr("selfkd.experiments.deploy.save_row", killed)
    with pytest.raises(KeyboardInterrupt):  # other files are in place, and its summary is not
        deploy(run_on(folder, "deploy.prune=0.5"), best(folder))
    monkeypatch.undo()
    run = run_on(folder)
    assert finished(run.config, run.folder, best(folder)) is None
    assert deploy(run, best(folder)) == whole
    assert (folder / "deploy" / "float.onnx").read_bytes() == (
        folder / str(whole.row("float").file)
    ).read_bytes()


CHANGES: dict[str, Callable[[Deployed], Deployed]] = {
    "fewer in the ensemble": lambda source: replace(source, ensemble=source.ensemble[:1]),
    "other weights": lambda source: replace(
        source, ensemble=[replace(model, weight=0.5) for model in source.ensemble]
    ),
    "another average": lambda source: replace(source, average="logits"),
    "another model": lambda source: replace(source, model=source.ensemble[0]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_made_of_something_else_is_not_finished(
    deployed: tuple[Path, DeploySummary], change: Callable[[Deployed], Deployed]
) -> None:
    folder, _ = deployed
    run = run_on(folder)
    deploy(run, best(folder))
    assert finished(run.config, run.folder, best(folder)) is not None
    assert finished(run.config, run.folder, change(best(folder))) is None


def test_versions_processor_and_code_of_the_user_are_part_of_what_is_made(
    tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "net.py"
    file.write_text("def make(): ...")
    config, source = load_config(settings=SMALL), replace(best(trained), make_model=f"{file}:make")
    found = [digest_of(config, source)]
    file.write_text("def make(): ...  # otherwise")
    found.append(digest_of(config, source))
    monkeypatch.setattr("selfkd.experiments.deploy_forms.versions", lambda: {"torch": "9"})
    found.append(digest_of(config, source))
    monkeypatch.setattr("selfkd.experiments.deploy_forms.processor", lambda: "another")
    found.append(digest_of(config, source))
    found.append(digest_of(load_config(settings=[*SMALL, "data.name=mnist"]), source))
    assert len(set(found)) == 5
    moved = file.rename(tmp_path / "moved.py")
    assert digest_of(config, replace(source, make_model=f"{moved}:make")) == found[3]


@pytest.mark.parametrize(
    ("logits", "others", "difference"),
    [
        ([2.0, 1.0], [2.0, 1.0], 0),
        ([2.0, 1.0], [2.0, 2.0], 0.5),
        ([2.0, -math.inf], [2.0, -math.inf], 0),  # as of classes that a network excludes
        ([2.0, -math.inf], [2.0, 1.0], math.inf),
        ([2.0, 1.0], [2.0, math.nan], math.nan),
        ([math.nan, 1.0], [math.nan, 1.0], math.nan),
    ],
)
def test_logits_that_are_no_numbers_differ(
    logits: list[float], others: list[float], difference: float
) -> None:
    class Fixed(torch.nn.Module):
        def __init__(self, logits: list[float]) -> None:
            super().__init__()
            self.logits = logits

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return torch.tensor([self.logits] * len(inputs))

    found = _largest_difference(Fixed(logits), Fixed(others), torch.zeros(65, 1))
    assert found == pytest.approx(difference, nan_ok=True)


def test_fine_tuning_on_views_of_each_epoch_runs_the_teacher() -> None:
    """A run on labels alone may have them, and there is nothing to cache."""
    config = load_config(settings=["data.augment=light", "data.views=fresh", "rounds=0"])
    assert not config.at(_point(config, {})).reads_cache
    assert load_config().at(_point(load_config(), {})).reads_cache
