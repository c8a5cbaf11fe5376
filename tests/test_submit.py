"""Jobs from outside, on a head that users could have started: its token on, its ports its own."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray_head import ROOT, Head, ray_head

from selfkd import generations, submit
from selfkd.experiments.run_folder import RunFolder

TINY = ["search.trials=2", "train.epochs=2", "model.args={width: 4}"]
TINY += ["confirm.seeds=0", "tracking=none", "resources.cpu=1.5"]  # one worker, one thread
LIMIT = 600  # seconds that a loaded machine may take; nothing here waits for that long
TRAIN = """
from helper import make_student

def train_fn(trial):
    trial.report({"val_accuracy": 0.5}, student=make_student())
"""
GATED = """
import time
from pathlib import Path
from torch import nn

def train_fn(trial):
    while trial.generation == 1 and not Path(trial.params["gate"]).exists():
        time.sleep(0.05)
    trial.report({"val_accuracy": 0.5}, student=nn.Linear(2, 2))
"""
HELPER = """
from torch import nn

def make_student():
    return nn.Linear(2, 2)
"""


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with ray_head(tmp_path_factory.mktemp("head")) as head:
        yield head


def settings(storage: Path, *more: str) -> list[str]:
    return [word for setting in (f"storage={storage}", *TINY, *more) for word in ("--set", setting)]


def submitted(head: Head, *words: str, options: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, "-m", "selfkd.submit", "--address", head.dashboard, *options, *words]


def run(
    command: list[str], folder: Path, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT
    )


@pytest.fixture(scope="module")
def first(
    head: Head, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[tuple[str, bool]], int]:
    """One run as a job: where, each line with whether the client still ran, exit code."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "mine.yaml").write_text("rounds: 1\ntrain: {lr: 0.02}\n")
    (folder / "runs").mkdir()
    words = ["--", "generations", "--config", "mine.yaml", "--name", "first"]
    client = subprocess.Popen(
        submitted(head, *words, *settings(folder / "shared")),
        cwd=folder,
        env=head.env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert client.stdout is not None
    lines = [(line, client.poll() is None) for line in client.stdout]
    return folder, lines, client.wait(timeout=LIMIT)


def test_a_job_is_followed_line_by_line_and_ends_with_its_code(
    first: tuple[Path, list[tuple[str, bool]], int],
) -> None:
    folder, lines, code = first
    text = "".join(line for line, _ in lines)
    assert code == 0, text
    assert next(running for line, running in lines if "trial 0: val" in line)
    for part in ("2 in all", f"run folder {folder}/shared/first", "generation 1:", " ensemble "):
        assert part in text
    assert len(RunFolder(folder / "shared" / "first").results()) == 2
    assert "lr: 0.02" in (folder / "shared" / "first" / "config.yaml").read_text()


def test_only_the_package_and_the_config_travel(
    first: tuple[Path, list[tuple[str, bool]], int], head: Head
) -> None:
    """The runs, data and caches beside them stay; what the job was run from is its own copy."""
    (said,) = (line for line, _ in first[1] if "Running entrypoint" in line)
    assert "--config files/config/mine.yaml" in said
    assert str(first[0]) not in said.replace(f"storage={first[0]}/shared", "")


@pytest.mark.slow
def test_a_failing_job_ends_the_client_with_its_own_code(
    first: tuple[Path, list[tuple[str, bool]], int], head: Head
) -> None:
    """What only a worker can know is a fault of the input, too: one message, and code 2."""
    folder = first[0]
    words = ["--name", "other", *settings(folder / "shared", "model.name=selfkd_cmn")]
    done = run(submitted(head, "--", "generations", *words), folder, head.env())
    assert done.returncode == 2, done.stdout + done.stderr
    said = " ".join(done.stdout.split())
    assert "timm model name, got 'selfkd_cmn': did you mean selfkd_cnn" in said
    assert "Traceback" not in done.stdout + done.stderr
    assert "failed with exit code 2" in done.stderr
    assert not (folder / "shared" / "other").exists()  # so that the name is free again


@pytest.mark.slow  # test_pseudo_terminal has Ctrl-C and --resume, the next tests stop a job
def test_ctrl_c_stops_the_job_and_what_it_prints_continues_it(head: Head, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(GATED)
    gate, log = tmp_path / "gate", tmp_path / "log"
    words = ["--", "generations", "--train", "train.py:train_fn", "--rounds", "1"]
    words += ["--name", "stopped", *settings(tmp_path, "search.trials=1", f"params.gate={gate}")]
    with log.open("w") as output:
        client = subprocess.Popen(
            submitted(head, *words, options=("--name", "my-job")),
            cwd=tmp_path,
            env=head.env(),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        deadline = time.monotonic() + LIMIT
        while "generation 1 of 1" not in log.read_text():
            assert client.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        client.send_signal(signal.SIGINT)
        code = client.wait(timeout=LIMIT)
    text = log.read_text()
    assert code == 130, text
    assert "stopping my-job" in text
    assert "Traceback" not in text
    folder = tmp_path / "stopped"
    assert f"python -m selfkd.generations --resume {folder}" in text  # the job's own last words
    assert len(RunFolder(folder).results()) == 1
    *_, again = text.strip().splitlines()
    assert (
        again.split()
        == (
            f"python -m selfkd.submit --address {head.dashboard} -- "
            f"generations --resume {folder} --train train.py:train_fn"
        ).split()
    )
    gate.touch()
    done = run([sys.executable, *shlex.split(again)[1:]], tmp_path, head.env())
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(RunFolder(folder).results()) == 2


class Cluster:
    """Takes one job, and sends signals to the client while it is being submitted."""

    def __init__(self, *signals: signal.Signals, refusals: int = 0) -> None:
        self.signals, self.status, self.refusals = signals, "PENDING", refusals

    def submit_job(self, **_: Any) -> None:
        self.refusals -= 1
        if self.refusals >= 0:
            raise RuntimeError("status code 500: No available agent to submit job, please try …")
        for number in self.signals:
            os.kill(os.getpid(), number)
        self.status = "RUNNING"

    def stop_job(self, job: str) -> bool:
        self.status = "STOPPED"
        return True

    def get_job_info(self, job: str) -> Any:
        status = SimpleNamespace(value=self.status, is_terminal=lambda: self.status == "STOPPED")
        return SimpleNamespace(status=status, driver_exit_code=None, message="")

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        yield "selfkd: five generations; run folder /shared/runs/a\n"
        while self.status == "RUNNING":
            await asyncio.sleep(0.01)


def submit_to(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    from selfkd.execution import submission as remote

    monkeypatch.setattr(remote, "open_client", lambda address: cluster)
    words = ["--address", "h:1", "--name", "mine", *options, "--", "generations"]
    before = [signal.getsignal(number) for number in remote.SIGNALS]
    code = submit.main([*words, "--set", "storage=/shared"])
    assert [signal.getsignal(number) for number in remote.SIGNALS] == before
    return code


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("options", [(), ("--no-wait",)])
def test_a_job_that_was_interrupted_while_it_was_submitted_is_stopped(
    number: signal.Signals,
    options: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cluster = Cluster(number)
    assert submit_to(cluster, monkeypatch, *options) == 130
    assert cluster.status == "STOPPED"
    said = capsys.readouterr().err
    assert "submit: stopped mine; continue with:" in said
    assert "-- generations --resume /shared/runs/a" in said


def test_a_cluster_whose_nodes_are_starting_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from selfkd.execution import submission as remote

    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.0)
    cluster = Cluster(refusals=3)
    assert submit_to(cluster, monkeypatch, "--no-wait") == 0
    assert cluster.status == "RUNNING"
    monkeypatch.setattr(remote, "START_SECONDS", 0.0)
    assert submit_to(Cluster(refusals=3), monkeypatch, "--no-wait") == 2
    assert "the job was refused: status code 500: No available agent" in capsys.readouterr().err


def test_who_interrupts_twice_is_told_what_may_be_running(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit_to(Cluster(signal.SIGINT, signal.SIGTERM), monkeypatch) == 130
    said = capsys.readouterr().err
    assert (
        "left mine, which may be running; stop it: ray job stop --address http://h:1 mine" in said
    )
    assert "no job was submitted" not in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_before_anything_was_sent_there_is_no_job(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(submit, "stage", lambda *_, **__: os.kill(os.getpid(), number))
    cluster = Cluster()
    assert submit_to(cluster, monkeypatch) == 130
    assert cluster.status == "PENDING"
    assert "stopped; no job was submitted" in capsys.readouterr().err


TERMINATED = """
import os, signal, sys
from ray.job_submission import JobSubmissionClient as Client
from selfkd import submit
submit_job = Client.submit_job
def interrupted(*words, **options):
    os.kill(os.getpid(), signal.SIGTERM)
    return submit_job(*words, **options)
Client.submit_job = interrupted
raise SystemExit(submit.main())
"""


@pytest.mark.slow  # as above, but for Ray's own client and head
def test_a_job_that_was_only_just_submitted_can_be_stopped(
    first: tuple[Path, list[tuple[str, bool]], int], head: Head, tmp_path: Path
) -> None:
    """After another job, as a head that has only just started takes none."""
    words = submitted(head, "--", "generations", *settings(tmp_path), options=("--name", "early"))
    done = run([sys.executable, "-c", TERMINATED, *words[3:]], tmp_path, head.env())
    assert done.returncode == 130, done.stdout + done.stderr
    assert "stopped early" in done.stderr
    status = ["ray", "job", "status", "--address", head.dashboard, "early"]
    assert "Job 'early' was stopped" in run(status, tmp_path, head.env()).stdout


@pytest.mark.slow  # the job is that of `selfkd.submit`, by another client
def test_rays_own_job_command_does_the_same(head: Head, tmp_path: Path) -> None:
    """With a working directory, and a training function in it that imports what lies beside it."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "train.py").write_text(TRAIN)
    (folder / "helper.py").write_text(HELPER)
    (folder / "selfkd").symlink_to(ROOT / "selfkd")
    command = ["ray", "job", "submit", "--working-dir", ".", "--", "python", "-m"]
    command += ["selfkd.generations", "--rounds", "0", "--train", "train.py:train_fn"]
    command += ["--name", "theirs", "--set", f"storage={tmp_path}", "--set", "search.trials=1"]
    done = run(command, folder, head.env(RAY_API_SERVER_ADDRESS=head.dashboard))
    assert done.returncode == 0, done.stdout + done.stderr
    assert RunFolder(tmp_path / "theirs").results()[0].metrics["val_accuracy"] == 0.5


@pytest.mark.slow  # the other refusals of Ray's head are above and below
def test_a_working_dir_over_rays_limit_and_the_way_out(head: Head, tmp_path: Path) -> None:
    (tmp_path / "large.bin").write_bytes(os.urandom(101 << 20))
    (tmp_path / "train.py").write_text(TRAIN)
    options = ("--working-dir", str(tmp_path), "--no-wait")
    words = ["--", "generations", "--train", "train.py:train_fn", "--set", "storage=/dev/null"]
    done = run(submitted(head, *words, options=options), tmp_path, head.env())
    assert done.returncode == 2, done.stdout + done.stderr
    assert "--working-dir must be at most 100 MiB as a zip file" in done.stderr
    assert ".rayignore" in done.stderr
    (tmp_path / ".rayignore").write_text("*.bin\n")
    done = run(submitted(head, *words, options=options), tmp_path, head.env())
    assert done.returncode == 0, done.stdout + done.stderr
    job = done.stdout.strip()
    assert f"ray job logs --follow --address {head.dashboard} {job}" in done.stderr
    known = run(["ray", "job", "status", "--address", head.dashboard, job], tmp_path, head.env())
    assert job in known.stdout + known.stderr


TOKENS: dict[str, tuple[dict[str, str | None], str]] = {
    "mode": (
        {"RAY_AUTH_MODE": None},
        "RAY_AUTH_MODE must be token here, got none (a token lies in",
    ),
    "missing": (
        {"HOME": "/nonexistent"},
        "there is no token in /nonexistent/.ray/auth_token",
    ),
    "wrong": (
        {"RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef"},
        "the token in RAY_AUTH_TOKEN must be the cluster's, and it is another",
    ),
}


@pytest.mark.parametrize(
    ("way", "fault"),
    [
        ("submit", "wrong"),
        ("join", "mode"),
        ("join", "missing"),
        # the words are one function's, which hears the same of both ways
        pytest.param("submit", "mode", marks=pytest.mark.slow),
        pytest.param("submit", "missing", marks=pytest.mark.slow),
        pytest.param("join", "wrong", marks=pytest.mark.slow),
    ],
)
def test_the_token_is_asked_for_in_words(head: Head, tmp_path: Path, way: str, fault: str) -> None:
    changes, message = TOKENS[fault]
    command = submitted(head, "--", "generations", *settings(tmp_path))
    if way == "join":
        changes = {**changes, "RAY_ADDRESS": head.gcs}
        command = [sys.executable, "-m", "selfkd.generations", *settings(tmp_path)]
    done = run(command, tmp_path, head.env(**changes))
    assert done.returncode == 2, done.stdout + done.stderr
    for part in (message, "ray get-auth-token", "export RAY_AUTH_MODE=token"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert "failed with exit code" not in done.stderr  # no job was made


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        connections = []

        def accept() -> None:
            while True:
                try:
                    connections.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("kind", ["closed", "silent"])
def test_an_address_that_does_not_answer_is_one_message_in_seconds(
    kind: str, silent: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from selfkd.execution import submission as remote

    assert remote.ANSWER_SECONDS < 10
    monkeypatch.setattr(remote, "ANSWER_SECONDS", 1.0)
    address = silent if kind == "silent" else "127.0.0.1:1"
    code = submit.main(["--address", address, "--", "generations", "--set", "storage=/shared"])
    assert code == 2
    error = capsys.readouterr().err
    assert f"--address must answer, got http://{address}" in error
    assert "ray dashboard" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--address", "h:1", "--", "generations"], "storage: must be absolute"),
        (["--address", "h:1", "--", "generations", "--resume", "runs/a"], "--resume: must be abs"),
        (["--address", "h:1", "--", "ensemble", "--from", "runs/a"], "--from: must be absolute"),
        (["--address", "h:1", "--", "study", "--from", "runs/a"], "--from: must be absolute"),
        (["--address", "h:1", "--", "capacity", "--values", "2"], "storage: must be absolute"),
        (["--address", "h:1", "--", "generations", "--set", "trian.lr=1"], "did you mean train"),
        (["--address", "ray://h:1", "--", "generations", "OK"], "--address must be http://HOST"),
        (["--env", "NOT_SET", "--address", "h:1", "--", "generations", "OK"], "got NOT_SET"),
        (["--", "generations", "OK"], "--address must be given"),
    ],
)
def test_mistakes_are_found_before_anything_is_sent(
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    if words[-1] == "OK":
        words = [*words[:-1], "--set", "storage=/shared"]
    assert submit.main(words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [[], ["--"], ["--", "targets", "ls"], ["generations"], ["--rounds", "5"]]
)
def test_without_a_command_it_says_how(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        submit.main(["--address", "h:1", *words])
    assert end.value.code == 2
    message = "after -- must come one of generations, ensemble, capacity, study"
    assert message in capsys.readouterr().err


def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(submit.importlib.util, "find_spec", lambda name: None)
    assert submit.main(["--address", "h:1", "--", "generations"]) == 2
    assert "pip install 'selfkd[cluster]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "written",
    [
        ["--config", "a/b.yaml", "--train", "c/d.py:f"],
        ["--train=c/d.py:f", "--config=a/b.yaml"],
        ["--conf", "a/b.yaml", "--trai", "c/d.py:f", "--seed", "1"],
    ],
)
def test_files_that_the_command_names_are_staged(
    written: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a/b.yaml", "c/d.py", "runs/x", "c/beside.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "staged"
    folder.mkdir()
    arguments = generations.make_parser().parse_args(written)
    command = submit.stage(folder, ["generations", *written], arguments)
    again = generations.make_parser().parse_args(command[1:])
    assert (again.config, again.train) == ("files/config/b.yaml", "files/train/d.py:f")
    assert again.seed == arguments.seed
    staged = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    own = {name for name in staged if name.startswith("selfkd/")}
    assert staged - own == {"files/config/b.yaml", "files/train/d.py"}
    source = Path(generations.__file__).parent
    files = [file for file in source.rglob("*") if file.is_file() and file.suffix != ".pyc"]
    assert own == {f"selfkd/{file.relative_to(source)}" for file in files}
    assert (folder / "files/config/b.yaml").read_text() == "a/b.yaml"


def test_files_outside_the_working_dir_are_refused(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "a.yaml").touch()
    (tmp_path / "b.yaml").touch()
    for name, number in (("inside/a.yaml", 0), ("b.yaml", 1)):
        words = ["generations", "--config", str(tmp_path / name)]
        folder = tmp_path / f"staged-{number}"
        folder.mkdir()
        arguments = generations.make_parser().parse_args(words[1:])
        if number == 0:
            command = submit.stage(folder, words, arguments, working_dir=tmp_path / "inside")
            assert command == ["generations", "--config", "a.yaml"]
        else:
            with pytest.raises(submit.ConfigError, match="must lie in --working-dir"):
                submit.stage(folder, words, arguments, working_dir=tmp_path / "inside")


def environment(*words: str, staged: Path = Path("/staged")) -> dict[str, object]:
    return submit.runtime_env(submit.make_parser().parse_args(words), staged)


def test_runtime_environment_is_merged_and_no_secret_goes_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret-key")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret-token")
    file = tmp_path / "env.yaml"
    file.write_text("pip: [scipy]\nenv_vars: {A: '1'}\n")
    plain = environment("--runtime-env", str(file))
    assert plain == {"pip": ["scipy"], "env_vars": {"A": "1"}, "working_dir": "/staged"}
    assert "secret" not in json.dumps([plain, environment()])
    assert capsys.readouterr().err == ""
    named = environment("--runtime-env", str(file), "--env", "WANDB_API_KEY")
    assert named["env_vars"] == {"A": "1", "WANDB_API_KEY": "secret-key"}
    assert "WANDB_API_KEY become part of the job's runtime environment" in capsys.readouterr().err


def test_a_working_dir_travels_with_the_package_beside_it(tmp_path: Path) -> None:
    assert environment("--working-dir", str(tmp_path)) == {
        "working_dir": str(tmp_path),
        "py_modules": ["/staged/selfkd"],
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pip: [", "must be YAML"),
        ("- pip", "must be a mapping"),
        ("working_dir: .", "must be given as --working-dir"),
        ("!!python/object/apply:os.system [true]", "must be YAML"),
    ],
)
def test_a_wrong_runtime_environment_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "env.yaml"
    file.write_text(text)
    with pytest.raises(submit.ConfigError, match=message):
        environment("--runtime-env", str(file))
