"""`python -m selfkd.dashboard`: a saved view of a W&B project, with runs side by side."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from selfkd.cli.output import print_data, print_error, safe_output
from selfkd.errors import ConfigError
from selfkd.results import METRICS, find_metric, title
from selfkd.text import one_line
from selfkd.tracking.host import answers, base_url, has_key
from selfkd.tracking.surroundings import split_project

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Section, Workspace

USAGE, FAILED = 2, 1
NAME = "selfkd: generations"
DEFAULT_PROJECT = "selfkd"
INSTALL = "pip install 'selfkd[workspace]'"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m selfkd.dashboard",
        description="Save a view in a W&B project: the metric per generation, T and alpha.",
    )
    parser.add_argument("--project", default=DEFAULT_PROJECT, help="project of the runs")
    parser.add_argument("--entity", help="user or team (default: your own)")
    parser.add_argument("--name", default=NAME, help="name of the view")
    parser.add_argument(
        "--metric",
        default="accuracy",
        choices=list(METRICS),
        help="metric that the models are compared by: accuracy of images, nll of text",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the view; needs neither a key nor a network"
    )
    return parser


@safe_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    arguments = make_parser().parse_args(argv)
    try:
        import wandb_workspaces  # noqa: F401
    except ImportError:
        return _fail(f"selfkd.dashboard needs wandb-workspaces: {INSTALL}", USAGE)
    try:
        entity, project = split_project(
            arguments.project, arguments.entity, named=("--project", "--entity")
        )
        url = "" if arguments.json else base_url()
    except ConfigError as error:
        return _fail(str(error), USAGE)
    if arguments.json:
        view = make_workspace(entity or "", project, name=arguments.name, metric=arguments.metric)
        return print_data(to_json(view) + "\n")
    if not has_key(url):
        missing = "there is no W&B key: run wandb login or set WANDB_API_KEY (or print with --json)"
        return _fail(missing, USAGE)
    if not answers(url):
        return _fail(f"{url} does not answer: print the view with --json", FAILED)
    try:
        owner = entity or _own_entity()
        view = make_workspace(owner, project, name=arguments.name, metric=arguments.metric).save()
    except Exception as error:  # noqa: BLE001 - the library raises what its network raises
        return _fail(f"the view could not be saved: {error}", FAILED)
    print(f"view saved: {one_line(view.url)}")  # noqa: T201
    return 0


def make_workspace(
    entity: str, project: str, *, name: str = NAME, metric: str = "accuracy"
) -> Workspace:
    """Return the view of a project, not saved yet.

    Trials and lineages are runs of one project: each panel shows the runs that have its metrics.

    Args:
        entity: User or team.
        project: Project of the runs.
        name: Name of the view.
        metric: Metric that the models are compared by.
    """
    from wandb_workspaces.workspaces import RunsetSettings, Workspace

    return Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[_generations(metric), _search(metric), _calibration()],
        runset_settings=RunsetSettings(
            pinned_columns=[
                *("run:displayName", "run:jobType", f"summary:best_test_{metric}"),
                *("summary:gain", "summary:gain_low", "summary:gain_high", "summary:verdict"),
            ]
        ),
    )


def to_json(view: Workspace) -> str:
    """Return a view in W&B's own JSON."""
    text: str = view._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=2)
    return text


def _generations(metric: str) -> Section:
    import wandb_workspaces.reports.v2 as panels
    from wandb_workspaces.workspaces import Section

    axis = {"x": "generation", "title_x": "generation"}
    tested, validated = f"test_{metric}", f"val_{metric}"
    return Section(
        name=f"{find_metric(metric).label} per generation",
        is_open=True,
        panels=[
            panels.LinePlot(title=title(tested), y=[tested], **axis),
            panels.LinePlot(
                title=f"{title(tested)} on fresh seeds, mean and 95 % interval",
                y=[f"confirmed/{tested}{end}" for end in ("", "_low", "_high")],
                **axis,
            ),
            panels.LinePlot(title=title(validated), y=[validated], **axis),
            panels.LinePlot(title="teacher agreement", y=["agreement"], **axis),
            panels.BarPlot(
                title="gain over generation 0",
                metrics=[panels.SummaryMetric("gain")],
                orientation="h",
            ),
        ],
    )


def _search(metric: str) -> Section:
    import wandb_workspaces.reports.v2 as panels
    from wandb_workspaces.workspaces import Section

    temperature = panels.Config("distill.temperature")
    alpha = panels.Config("distill.alpha")
    validated = title(f"val_{metric}")
    value = panels.SummaryMetric(f"trial_val_{metric}")  # which a lineage does not have
    column = panels.ParallelCoordinatesPlotColumn
    return Section(
        name="T and alpha",
        is_open=True,
        panels=[
            panels.ParallelCoordinatesPlot(
                title="trials",
                columns=[
                    column(metric=panels.Config("generation"), display_name="generation"),
                    column(metric=temperature, display_name="T", log=True),
                    column(metric=alpha, display_name="alpha"),
                    column(metric=value, display_name=validated),
                ],
            ),
            panels.ScatterPlot(
                title=f"{validated} over T and alpha",
                x=temperature,
                y=alpha,
                z=value,
                log_x=True,
            ),
            panels.LinePlot(title="learning curves", x="epoch", y=[f"val_{metric}"]),
        ],
    )


def _calibration() -> Section:
    import wandb_workspaces.reports.v2 as panels
    from wandb_workspaces.workspaces import Section

    axis = {"x": "generation", "title_x": "generation"}
    return Section(
        name="calibration",
        is_open=True,
        panels=[
            panels.LinePlot(title="ECE, 15 bins", y=["test_ece"], **axis),
            panels.LinePlot(title="NLL", y=["test_nll"], **axis),
            panels.LinePlot(title="Brier score", y=["brier"], **axis),
        ],
    )


def _own_entity() -> str:
    from selfkd.tracking.run import default_entity

    return default_entity()


def _fail(text: str, code: int) -> int:
    print_error(text)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
