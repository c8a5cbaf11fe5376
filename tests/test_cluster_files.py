"""The cluster file, the job manifest and the Slurm script, against what reads them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.util import prepare_config, validate_config

from selfkd import generations, submit
from selfkd.config import load_config

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "examples" / "cluster.yaml"
JOB = ROOT / "examples" / "rayjob.yaml"
SLURM = ROOT / "examples" / "slurm.sbatch"


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    prepared: dict[str, Any] = prepare_config(yaml.safe_load(CLUSTER.read_text()))
    return prepared


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(JOB.read_text())
    return loaded


def test_ray_accepts_the_cluster_file(cluster: dict[str, Any]) -> None:
    """By the schema of `ray up` itself, with the defaults of its provider filled in."""
    validate_config(cluster)
    assert cluster["provider"]["type"] == "aws"


def test_ray_would_refuse_a_key_that_it_does_not_know(cluster: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="max_worker"):
        validate_config({**cluster, "max_worker": 3})


def test_gpu_workers_come_and_go_and_the_head_trains_nothing(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    assert types[cluster["head_node_type"]]["resources"] == {"CPU": 0}
    (gpu,) = (kind for kind in types.values() if kind["resources"].get("GPU"))
    assert (gpu["min_workers"], gpu["max_workers"]) == (0, cluster["max_workers"])
    trial = load_config(ROOT / "tune_configs" / "cifar100_wrn28.yaml").resources
    assert trial.cpu <= gpu["resources"]["CPU"]
    assert trial.gpu <= gpu["resources"]["GPU"]


def test_the_cluster_keeps_to_itself(cluster: dict[str, Any]) -> None:
    """Every node has the token, and the dashboard is reached through SSH only."""
    assert cluster["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert any("RAY_AUTH_MODE=token" in line for line in cluster["setup_commands"])
    start = " ".join(cluster["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in start


def test_nodes_get_every_package_that_selfkd_needs(cluster: dict[str, Any]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installed = " ".join(cluster["setup_commands"])
    for requirement in project["dependencies"]:
        name, version = re.fullmatch(r"([\w-]+)(?:\[\w+\])?(>=[\d.]+)", requirement).groups()  # type: ignore[union-attr]
        assert re.search(rf'"{name}(\[[\w,]+\])?({version}|==[\d.]+)"', installed), requirement


def test_commands_in_the_cluster_file_are_understood() -> None:
    text = CLUSTER.read_text().replace("\\\n#", "")
    (line,) = re.findall(r"python -m selfkd\.submit (.*)", text)
    before, _, after = line.partition(" -- ")
    submit.make_parser().parse_args(shlex.split(before))
    arguments = generations.make_parser().parse_args(shlex.split(after)[1:])
    config = load_config(ROOT / arguments.config, settings=arguments.settings)
    assert submit.relative_paths(config, ("storage", config.storage)) == []


def test_the_jobs_entrypoint_is_understood(job: dict[str, Any]) -> None:
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "selfkd.generations"]
    arguments = generations.make_parser().parse_args(words[3:])
    path = ROOT / Path(arguments.config).relative_to("/opt/selfkd")
    config = load_config(path, settings=arguments.settings, flags={"rounds": arguments.rounds})
    assert config.rounds == 5
    assert submit.relative_paths(config, ("storage", config.storage)) == []


def test_the_jobs_pods_fit_its_trials(job: dict[str, Any]) -> None:
    words = shlex.split(job["spec"]["entrypoint"])
    arguments = generations.make_parser().parse_args(words[3:])
    path = ROOT / Path(arguments.config).relative_to("/opt/selfkd")
    trial = load_config(path, settings=arguments.settings).resources
    (workers,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert trial.cpu <= float(limits["cpu"])
    assert 0 < trial.gpu <= float(limits["nvidia.com/gpu"])
    assert limits == container["resources"]["requests"]  # as Ray counts them


def test_the_jobs_structure(job: dict[str, Any]) -> None:
    """KubeRay's own schema is on no package index: names as in its API reference of 1.6."""
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    assert isinstance(yaml.safe_load(spec["runtimeEnvYAML"]), dict)
    assert set(spec) == {
        *("entrypoint", "runtimeEnvYAML", "shutdownAfterJobFinishes"),
        *("ttlSecondsAfterFinished", "rayClusterSpec"),
    }
    assert set(cluster) == {
        *("rayVersion", "authOptions", "enableInTreeAutoscaling"),
        *("headGroupSpec", "workerGroupSpecs"),
    }
    assert cluster["authOptions"] == {"mode": "token"}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        (container,) = group["template"]["spec"]["containers"]
        assert container["volumeMounts"] == [{"name": "shared", "mountPath": "/shared"}]
        volumes = group["template"]["spec"]["volumes"]
        assert [volume["name"] for volume in volumes] == ["shared"]


def test_what_travels_as_the_working_directory_is_the_code_and_not_what_lies_beside_it(
    tmp_path: Path,
) -> None:
    """As Ray packs it, which matches a name without a leading slash in every folder."""
    folder = tmp_path / "repository"
    shutil.copytree(ROOT / "selfkd", folder / "selfkd")
    for name in (".rayignore", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    left = ("runs/digits/config.yaml", "data/cifar/batch", "wandb/run/log", ".venv/x", ".git/HEAD")
    for name in left:
        (folder / name).parent.mkdir(parents=True)
        (folder / name).touch()
    for respected in (False, True):  # Ray can be told to leave .gitignore unread
        packed = tmp_path / f"{respected}.zip"
        create_package(str(folder), packed, include_gitignore=respected)
        names = set(zipfile.ZipFile(packed).namelist())
        code = {str(file.relative_to(ROOT)) for file in (ROOT / "selfkd").rglob("*.py")}
        assert "selfkd/data/folder.py" in code <= names
        assert not names & set(left)


def test_kubernetes_accepts_the_jobs_pods(job: dict[str, Any]) -> None:
    """Where the Kubernetes client is installed: its models know every key of a pod."""
    models = pytest.importorskip("kubernetes.client")
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        models.V1PodTemplateSpec.model_validate(group["template"])


def test_the_slurm_script_is_understood() -> None:
    subprocess.run(["bash", "-n", SLURM], check=True)
    text = SLURM.read_text().replace("\\\n#", "")
    (command,) = re.findall(r"#   sbatch examples/slurm.sbatch (.*)", text)
    arguments = generations.make_parser().parse_args(shlex.split(command))
    config = load_config(ROOT / arguments.config, settings=arguments.settings)
    (gpus,) = re.findall(r"#SBATCH --gpus-per-node=(\d+)", text)
    assert 0 < config.resources.gpu <= int(gpus)
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert any("RAY_AUTH_MODE=token" in line for line in lines)
    assert not any("ray start" in line and "TOKEN" in line for line in lines)


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a job on two nodes of one CPU, both of which are this machine."""
    programs = {"srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"', "scontrol": "echo node"}
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    python = Path(sys.executable).parent
    (tmp_path / "venv" / "bin" / "activate").write_text(f"PATH={tmp_path}:{python}:$PATH\n")
    short = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # it holds sockets
    yield {
        **{name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"},
        **{"SHARED": str(tmp_path), "RAY_TMPDIR": short, "SLURM_JOB_NODELIST": "node[1-2]"},
        **{
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "1",
        },
    }
    shutil.rmtree(short, ignore_errors=True)


@pytest.mark.slow  # a minute and a half; Ray's own start on several nodes is in tests/faults
def test_a_slurm_job_runs_on_all_nodes_stops_in_time_and_goes_on(
    tmp_path: Path, slurm: dict[str, str]
) -> None:
    settings = "search.trials=2", "train.epochs=400", "confirm.seeds=0", "tracking=none"
    sets = [word for setting in settings for word in ("--set", setting)]
    command = ["bash", str(SLURM), "--rounds", "0", *sets]
    log = tmp_path / "log"
    with log.open("w") as output:
        job = subprocess.Popen(command, env=slurm, stdout=output, stderr=output)
        wait_for(log, "generation 0 of 0: 2 trials")
        job.send_signal(signal.SIGTERM)  # as Slurm does before the time is up
        assert job.wait(60) == 130, log.read_text()
    assert "--resume" in log.read_text()
    again = subprocess.run(command[:2], env=slurm, capture_output=True, text=True, timeout=180)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "on 2 workers" in again.stdout
    assert "generation 0: val" in again.stdout


def wait_for(log: Path, words: str, *, seconds: float = 120) -> None:
    """Wait until words are in a file."""
    end = time.monotonic() + seconds
    while words not in log.read_text():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.2)
