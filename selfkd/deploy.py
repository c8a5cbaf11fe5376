"""`python -m selfkd.deploy`: from a trained model to files that are served, with their measures.

The module can be called, too: `selfkd.deploy("runs/NAME", prune=0.5)`.
"""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from selfkd.analysis.deploy import deploy_sentences
from selfkd.analysis.verdicts import count
from selfkd.cli.command import FAILED, Command, Description
from selfkd.cli.options import USAGE, base_parser, config_flags
from selfkd.cli.output import print_error, safe_output
from selfkd.cli.plan import plan_deploy
from selfkd.cli.result import Given, Result, Settings, run_command
from selfkd.cli.signals import inside_job
from selfkd.config import Config, ModelConfig
from selfkd.deployment import check_installed
from selfkd.errors import ConfigError
from selfkd.experiments import deploy as recipe
from selfkd.experiments.arms import Run
from selfkd.experiments.deploy_forms import FOLDER, Deployed
from selfkd.experiments.given import check_given, import_generation
from selfkd.experiments.run_folder import RunFolder
from selfkd.loading.choose import choose
from selfkd.reporting.deploy_table import deploy_table
from selfkd.results import DeploySummary, GenerationResult, Model, Row
from selfkd.storage.files import parse_json
from selfkd.storage.remote import RemotePath, as_path, secret_fault
from selfkd.text import shell_quote

EXAMPLES = {"images": "IMAGE", "features": "FEATURES.npy", "text": "'The value of'"}
"""Arguments with which `predict.py` may be tried."""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = base_parser(
        "deploy",
        "Export a trained model to ONNX, in float and in int8, and measure both; prune or round it "
        "before, with distillation from itself.",
    )
    parser.add_argument(
        "--from", metavar="RUN", dest="given", help="run folder whose chosen model is deployed"
    )
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="file of weights of the config's model that is deployed, with --config",
    )
    parser.add_argument(
        "--generation", type=int, metavar="N", help="another generation of the run than the best"
    )
    parser.add_argument(
        "--prune",
        type=float,
        metavar="SHARE",
        dest="deploy.prune",
        help="share of the channels of each layer that is pruned before, such as 0.5",
    )
    parser.add_argument(
        "--bits",
        type=int,
        dest="deploy.bits",
        metavar="4|3|2",
        help="bits of the weights of matrix products, which are fine-tuned rounded",
    )
    parser.add_argument(  # in place of those on which a choice is replicated
        "--seeds",
        type=int,
        metavar="N",
        dest="deploy.seeds",
        help="seeds on which what --prune or --bits makes is fine-tuned",
    )
    parser.set_defaults(**{"confirm.seeds": None})
    parser.add_argument(
        "--max-drop",
        type=float,
        metavar="X",
        dest="deploy.max_drop",
        help="most points of validation accuracy, or nats, that int8 may cost; past it exit code 1",
    )
    parser.add_argument(
        "--ensemble",
        action="store_true",
        default=None,
        dest="deploy.ensemble",
        help="export the ensemble of the run, too, as one graph, and measure what it costs",
    )
    parser.add_argument(
        "--make-model",
        metavar="FILE.py:FUNCTION",
        help="function that makes the network of a run with --train",
    )
    return parser


@safe_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    arguments = make_parser().parse_args(argv)
    flags = {key: value for key, value in vars(arguments).items() if key.startswith("deploy.")}
    named = arguments.__dict__["model.name"] is not None
    flags["generation_0.path"] = arguments.checkpoint
    flags["model"] = _network_of(arguments.checkpoint, arguments.settings, named=named)
    if arguments.given and arguments.resume:
        print_error(f"--from {arguments.given} must not be given with --resume, which is the same")
        return USAGE
    arguments.resume = arguments.given or arguments.resume
    again = "" if arguments.resume is None else _again(arguments)
    command = _command(arguments.generation, arguments.make_model, arguments.checkpoint, again)
    return command.main(arguments, flags)


def _again(arguments: argparse.Namespace) -> str:
    """Return what continues the deployment of a run, whose config says nothing of it."""
    own = {key: value for key, value in vars(arguments).items() if key.startswith("deploy.")}
    flags = {f"--{key.partition('.')[2].replace('_', '-')}": value for key, value in own.items()}
    flags |= {"--generation": arguments.generation, "--config": arguments.config}
    flags["--make-model"] = arguments.make_model and _absolute(arguments.make_model)
    common = {key: value for key, value in config_flags(arguments).items() if value is not None}
    settings = [*arguments.settings, *(f"{key}={value}" for key, value in common.items())]
    given = [(flag, value) for flag, value in flags.items() if value is not None]
    words = [[flag] if value is True else [flag, str(value)] for flag, value in given]
    words += [["--set", setting] for setting in settings]
    return " ".join(shell_quote(word) for pair in words for word in pair)


def run_deploy(
    run: str | Path | None = None,
    *,
    checkpoint: str | Path | None = None,
    config: Given = None,
    generation: int | None = None,
    prune: float | None = None,
    bits: int | None = None,
    max_drop: float | None = None,
    ensemble: bool | None = None,
    make_model: str | None = None,
    settings: Settings = (),
    quiet: bool = False,
) -> Result[DeploySummary]:
    """Export a trained model to ONNX, in float and in int8, and measure both.

    Args:
        run: Run folder whose chosen model is deployed.
        checkpoint: File of weights of the config's model, in place of `run`.
        config: YAML file, or a mapping like its content, with `checkpoint`.
        generation: Number of a generation of the run; the best on validation when not given.
        prune: Share of the channels of each layer that is pruned before, in (0, 1).
        bits: Bits of the weights of matrix products, 4, 3 or 2, which are fine-tuned rounded.
        max_drop: Most points of validation accuracy, or nats, that int8 may cost.
        ensemble: Whether the ensemble of the run is exported, too.
        make_model: Reference `path/file.py:function` of what makes the network of a run with a
            training function of your own.
        settings: Further values by dotted key, or `dotted.key=value` texts as after `--set`.
        quiet: Whether the table and errors only are printed.

    Returns:
        The result: table, verdict and files; `summary.exceeded` says whether int8 costs more than
        `max_drop`.

    Raises:
        ValueError: A setting or the model is not as it must be.
        RuntimeError: A step failed.
    """
    flags: dict[str, Any] = {"deploy.prune": prune, "deploy.bits": bits}
    flags |= {"deploy.max_drop": max_drop, "deploy.ensemble": ensemble}
    flags["generation_0.path"] = None if checkpoint is None else str(checkpoint)
    keys = [settings] if isinstance(settings, str) else list(settings)
    flags["model"] = _network_of(checkpoint, keys)
    return run_command(
        _command(generation, make_model, checkpoint),
        config=config,
        settings=settings,
        flags=flags,
        resume=run,
        quiet=quiet,
    )


def _network_of(
    checkpoint: str | Path | None, settings: Sequence[str], *, named: bool = False
) -> Row | None:
    """Return the network that a file of weights names, as those do that selfkd wrote.

    Args:
        checkpoint: File of weights.
        settings: Settings, by one of which the user may name the network.
        named: Whether the user names it by a flag.
    """
    if checkpoint is None or named or any(key.startswith("model") for key in settings):
        return None
    try:
        with safe_open(as_path(checkpoint), framework="np") as file:
            facts = parse_json((file.metadata() or {})["facts"])
        ModelConfig.of_checkpoint(facts["model"])
        found: Row = facts["model"]
    except (SafetensorError, OSError, LookupError, TypeError, ValueError):
        return None  # of others the config names it
    return found


def _greet(config: Config, generation: int | None, make_model: str | None) -> str:
    options, made = config.deploy, ["float and int8 files"]
    if options.prune is not None:
        made.append(f"pruned by {options.prune:.0%} on {count(options.seeds, 'seed')}")
    if options.bits is not None:
        made.append(f"{options.bits}-bit weights on {count(options.seeds, 'seed')}")
    if options.ensemble:
        made.append("the ensemble as one graph")
    given = config.generation_0.path is not None
    network = make_model or config.network(0 if given else generation).name
    return f"deploying {network} on {config.data.name}: {', '.join(made)}"


def _absolute(reference: str) -> str:
    path, colon, name = reference.rpartition(":")
    if not colon or inside_job():  # workers have other folders
        return reference
    return f"{Path(path).expanduser().absolute()}:{name}"


def _command(
    generation: int | None = None,
    make_model: str | None = None,
    checkpoint: str | Path | None = None,
    again: str = "",
) -> Command[DeploySummary]:
    """Return the command.

    Args:
        generation: Number of the generation that is deployed; the best when not given.
        make_model: Reference of the function that makes a user's network.
        checkpoint: File of weights that is deployed, which no run may be given with.
        again: Words that are repeated to continue.
    """
    make_model = make_model and _absolute(make_model)

    def find(config: Config, folder: RunFolder) -> Deployed | None:
        """Return what is deployed; None where it is still to be imported."""
        if folder.command == "deploy":
            _refuse_of_runs(config, generation, make_model)
            results = folder.results()
            return _imported(results[0]) if results else None
        return _of_run(config, folder, generation, make_model)

    def check_folder(folder: RunFolder, config: Config) -> None:
        if checkpoint is not None:
            raise ConfigError(
                f"--checkpoint must be left out with --from, whose run names its model, got "
                f"{checkpoint}"
            )
        check_installed()
        find(config, folder)

    def check(config: Config) -> None:
        _check(config)
        _refuse_of_runs(config, generation, make_model)

    def finished(config: Config, folder: RunFolder) -> DeploySummary | None:
        source = find(config, folder)
        return None if source is None else recipe.finished(config, folder, source)

    def work(run: Run) -> DeploySummary:
        source = find(run.config, run.folder)
        if source is None:
            run.folder.keep(run.config, run.check())
            source = _imported(import_generation(run))
        return recipe.deploy(run, source)

    return Command(
        name="deploy",
        check=check,
        greet=lambda config: _greet(config, generation, make_model),
        finished=finished,
        work=work,
        describe=_describe,
        plan=plan_deploy,
        most=lambda config: config.deploy.trainings or 1,
        check_folder=check_folder,
        free=("data.",) if make_model is not None else (),  # which its training never read
        flag="--from",
        of_file="weights without their run are --checkpoint FILE, with --config YAML",
        again=again,
        code=lambda summary: FAILED if summary.exceeded else 0,
    )


def _check(config: Config) -> None:
    """Check what is given in place of a run."""
    if config.generation_0.path is None:
        raise ConfigError(
            "--from must be given: the run folder whose model is deployed; or --checkpoint FILE "
            "with --config YAML, for weights without their run"
        )
    place = as_path(config.generation_0.path)
    if (place / "config.yaml").exists():
        raise ConfigError(f"--checkpoint must be a file of weights, got a run: --from {place}")
    if isinstance(place, RemotePath):
        raise ConfigError(
            f"--checkpoint must be a file of this machine, got {place}: fetch it first"
        )
    if not place.is_file():
        raise ConfigError(f"--checkpoint must be a file of weights that is there, got {place}")
    check_given(config)
    check_installed()


def _refuse_of_runs(config: Config, generation: int | None, make_model: str | None) -> None:
    """Refuse what only a run has, where weights are deployed without theirs."""
    given = {"--generation": generation, "--make-model": make_model}
    given["--ensemble"] = config.deploy.ensemble or None
    for flag, value in given.items():
        if value is not None:
            raise ConfigError(
                f"{flag} must be left out for weights without their run, got {value}: give the run "
                "by --from"
            )


def _imported(result: GenerationResult) -> Deployed:
    title = result.origin.name if result.origin is not None else "the checkpoint"
    return Deployed(title=title, model=result.models[0])


def _of_run(
    config: Config, folder: RunFolder, generation: int | None, make_model: str | None
) -> Deployed:
    """Return what is deployed of a run of another command.

    Raises:
        ConfigError: It has no such model, or not yet.
    """
    file = shell_quote(str(folder.path / "config.yaml"))
    way = f"deploy one by --checkpoint FILE --config {file} --name NAME"
    chosen, options = choose(folder, config, generation=generation, way=way), config.deploy
    facts = folder.facts
    if facts.function is not None and make_model is None:
        raise ConfigError(
            f"--make-model must be given for {folder.path}, whose models were trained by a "
            "function of your own: --make-model FILE.py:FUNCTION names a function that makes the "
            "network"
        )
    if facts.function is None and make_model is not None:
        raise ConfigError(
            f"--make-model must be left out for {folder.path}, whose networks are made by name, "
            f"got {make_model}"
        )
    if make_model is not None:
        given = {"--prune": options.prune, "--bits": options.bits}
        given["--ensemble"] = options.ensemble or None
        for flag, value in given.items():
            if value is not None:
                raise ConfigError(
                    f"{flag} must be left out with --make-model: a network of your own is exported "
                    f"and quantised alone, got {value}"
                )
        _check_function(make_model)
    several = choose(folder, config, ensemble=True) if options.ensemble else None
    return Deployed(
        title=chosen.title,
        model=_hashed(folder, chosen.models[0]),
        point=chosen.point or {},
        ensemble=() if several is None else several.models,
        average=config.distill.average if several is None else str(several.average),
        make_model=make_model,
    )


def _check_function(reference: str) -> None:
    path = reference.rpartition(":")[0]
    if fault := secret_fault(path):
        raise ConfigError(f"--make-model {fault}")
    if not path.endswith(".py") or not Path(path).is_file():
        raise ConfigError(
            f"--make-model must be FILE.py:FUNCTION with a file that is there, got {reference}"
        )


def _hashed(folder: RunFolder, model: Model) -> Model:
    """Return a model with its hash, which a student that is not finished has none of."""
    if not model.hash:
        raise ConfigError(
            f"{folder.path} must be finished before its student is deployed: continue it with "
            f"python -m selfkd.{folder.command} --resume {folder.path}"
        )
    return model


def _describe(config: Config, folder: RunFolder, summary: DeploySummary) -> Description:
    place = folder.path / FOLDER
    files = [
        f"{name:<13} {place / name}" for name in summary.files if name.endswith((".onnx", ".py"))
    ]
    where = shell_quote(str(folder.path))
    again = f"python -m selfkd.deploy --from {where}"
    can_prune = config.task == "images" and bool(summary.network) and not config.deploy.prune
    tried = f"python {shell_quote(str(place / 'predict.py'))} {EXAMPLES[config.inputs]}"
    if "predict.py" not in summary.files:
        tried = f"python -m selfkd.report {where}"
    said = deploy_sentences(summary, folder.facts, short=True)
    return Description(
        said,
        deploy_table(summary, folder.facts),
        files,
        f"{again} --prune 0.5" if can_prune else tried,
        [sentence for sentence in summary.sentences if sentence not in said],
    )


class _Callable(types.ModuleType):
    """This module, which is the Python function of its name as well."""

    __call__ = staticmethod(run_deploy)


if __name__ == "__main__":
    raise SystemExit(main())
sys.modules[__name__].__class__ = _Callable
