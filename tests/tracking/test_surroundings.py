"""What W&B reads of its surroundings: its modes, names, variables, files and folders."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from selfkd.config import load_config
from selfkd.errors import ConfigError
from selfkd.tracking import FileTracker, NoTracker, WandbTracker, make_tracker, surroundings
from selfkd.tracking.host import base_url, has_key
from selfkd.tracking.surroundings import (
    is_set_up,
    own_folders,
    own_surroundings,
    settings,
    split_project,
    wanted_mode,
)


@pytest.fixture(autouse=True)
def nothing_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("mode", "means"),
    [
        *(("online", "online"), ("run", "online"), ("shared", "online"), ("", None)),
        *(("offline", "offline"), ("dryrun", "offline"), ("disabled", "none")),
    ],
)
def test_each_mode_of_wandb_means_the_same_here(
    mode: str, means: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    assert wanted_mode() == means


def test_all_modes_are_known() -> None:
    from typing import get_args

    import wandb

    from selfkd.tracking.surroundings import MODES

    assert set(MODES) == set(get_args(wandb.Settings.model_fields["mode"].annotation))


@pytest.mark.parametrize("mode", ["OFFLINE", "off", "none", "dry-run"])
def test_an_unknown_mode_is_refused_in_one_line(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    with pytest.raises(ConfigError, match=rf"^WANDB_MODE must be one of online, .*, got {mode}"):
        make_tracker(load_config(), name="a", run_id="a", folder=tmp_path)
    for given in ("none", "offline"):  # which do not ask for it
        config = load_config(settings=[f"tracking={given}"])
        make_tracker(config, name="a", run_id="a", folder=tmp_path).close()


@pytest.mark.parametrize(("value", "kind"), [("true", NoTracker), ("false", WandbTracker)])
def test_the_variable_of_other_libraries_disables_it(
    value: str, kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_DISABLED", value)
    tracker = make_tracker(load_config(), name="a", run_id="a", folder=tmp_path)
    tracker.close()
    assert type(tracker) is kind


NOT_IMPORTED = """
import sys
from pathlib import Path
from selfkd.config.load import load_config
from selfkd.tracking import make_tracker
tracker = make_tracker(load_config(), name="a", run_id="a", folder=Path())
print(tracker.description, "wandb" in sys.modules)
"""


def test_where_nobody_asks_for_it_it_is_not_imported(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NOT_IMPORTED], capture_output=True, text=True, check=True
    )
    told = "W&B: none, as there is no key for it: wandb login, or --set tracking=offline"
    assert done.stdout == f"{told} False\n"
    assert list(tmp_path.iterdir()) == []


def write_key(folder: Path, host: str) -> None:
    file = folder / ".netrc"
    file.write_text(f"machine {host} login user password {'0' * 40}\n")
    file.chmod(0o600)


@pytest.mark.parametrize(
    ("settings", "variables", "host", "kind"),
    [
        *(([], {}, "github.com", NoTracker), ([], {}, "api.wandb.ai", WandbTracker)),
        ([], {"WANDB_API_KEY": "0" * 40}, None, WandbTracker),
        ([], {"WANDB_MODE": "offline"}, None, WandbTracker),
        ([], {"WANDB_PROJECT": "mine"}, None, WandbTracker),
        ([], {"WANDB_DATA_DIR": "elsewhere"}, None, NoTracker),
        (["tracking.project=mine"], {}, None, WandbTracker),
        (["tracking.runs=lineage"], {}, None, WandbTracker),
        (["tracking.mode=auto", "tracking.project=selfkd"], {}, None, NoTracker),
        (["tracking.writers=[csv]"], {}, None, FileTracker),
    ],
)
def test_what_asks_for_wandb(
    settings: list[str],
    variables: dict[str, str],
    host: str | None,
    kind: type,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("selfkd.tracking.make.answers", lambda url: False)
    monkeypatch.delenv("NETRC", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if host is not None:
        write_key(tmp_path, host)
    config = load_config(settings=settings)
    tracker = make_tracker(config, name="a", run_id="a", folder=tmp_path / "run")
    tracker.close()
    assert type(tracker) is kind
    none = "none, as there is no key for it"
    assert (none in tracker.description) == (kind is NoTracker)


@pytest.mark.parametrize(
    ("name", "netrc", "mode"),
    [
        *((".netrc", None, 0o600), (".netrc", None, 0o644)),
        *(("_netrc", None, 0o600), ("keys", "~/keys", 0o600)),
    ],
    ids=["usual", "readable by others", "of Windows", "home in its name"],
)
def test_a_key_is_found_where_wandb_finds_it(
    name: str, netrc: str | None, mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wandb.sdk.lib.wbauth import read_netrc_auth

    monkeypatch.delenv("NETRC", raising=False)
    if netrc is not None:
        monkeypatch.setenv("NETRC", netrc)
    write_key(tmp_path, "api.wandb.ai")
    (tmp_path / ".netrc").rename(tmp_path / name).chmod(mode)
    assert read_netrc_auth(host="https://api.wandb.ai") == "0" * 40
    assert is_set_up()
    assert has_key(base_url())


def test_a_run_that_began_in_wandb_goes_on_there(tmp_path: Path) -> None:
    (tmp_path / "run" / "wandb").mkdir(parents=True)
    tracker = make_tracker(load_config(), name="a", run_id="a", folder=tmp_path / "run")
    tracker.close()
    assert type(tracker) is WandbTracker


def test_the_files_of_wandb_are_read(tmp_path: Path) -> None:
    """Which its commands write: `wandb offline`, `wandb login --host`."""
    file = tmp_path / ".config" / "wandb" / "settings"
    file.parent.mkdir(parents=True)
    file.write_text("[default]\nmode = offline\nbase_url = https://example.com\n")
    assert wanted_mode() == "offline"
    assert base_url() == "https://example.com"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("WANDB_BASE_URL", "example.com"), ("WANDB_BASE_URL", "https://wandb.ai")),
        *(("WANDB_HTTPS_PROXY", "x"), ("WANDB_INSECURE_DISABLE_SSL", "perhaps")),
        ("WANDB_API_KEY", "a key "),
    ],
)
def test_a_variable_that_wandb_refuses_is_named_in_one_line(
    name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    config = load_config(settings=["tracking=offline"])
    with pytest.raises(ConfigError) as refused:
        make_tracker(config, name="a", run_id="a", folder=tmp_path)
    text = str(refused.value)
    assert "\n" not in text
    assert (name in text) == (name != "WANDB_API_KEY")
    assert "a key " not in text


def test_a_wandb_that_cannot_be_imported_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ImportError("protobuf is too old")

    monkeypatch.setattr(surroundings, "import_wandb", fail)
    config = load_config(settings=["tracking=offline"])
    with pytest.raises(ConfigError, match=r"must be none where W&B .*\(protobuf is too old\)"):
        make_tracker(config, name="a", run_id="a", folder=tmp_path)


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = settings().base_url
    for name in ("WANDB_BASE_URL", "WANDB_API_KEY", "WANDB_ENTITY", "WANDB_HTTPS_PROXY"):
        monkeypatch.setenv(name, "")
    assert settings().base_url == usual


def test_variables_of_a_run_are_hidden_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "x")
    monkeypatch.setenv("WANDB_SERVICE", "old")
    monkeypatch.setenv("WANDB_ENTITY", "team")
    with own_surroundings():
        assert "WANDB_RUN_ID" not in os.environ
        assert os.environ["WANDB_ENTITY"] == "team"
        os.environ["WANDB_SERVICE"] = "new"  # W&B sets it
    assert (os.environ["WANDB_RUN_ID"], os.environ["WANDB_SERVICE"]) == ("x", "new")
    assert "WANDB_SILENT" not in os.environ


def test_temporary_files_go_where_there_is_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/dev/null/x")
    with own_surroundings():
        assert os.environ["TMPDIR"] == tempfile.gettempdir()
    assert os.environ["TMPDIR"] == "/dev/null/x"


@pytest.mark.parametrize(
    ("project", "entity", "message"),
    [
        ("team/a", "other", r"tracking\.project must be of tracking\.entity, got team/a and other"),
        ("a", "b/c", r"tracking\.entity must be a user or team"),
        ("a", "", r"tracking\.entity must be a user or team"),
        ("a", "x" * 129, r"tracking\.entity must be a user or team"),
    ],
)
def test_owners_that_wandb_cannot_have_are_refused(project: str, entity: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        split_project(project, entity)


def test_the_owner_of_the_environment_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_ENTITY", "team/project")
    with pytest.raises(ConfigError, match=r"^WANDB_ENTITY must be a user or team"):
        split_project("a", None)
    assert split_project("mine/a", None) == ("mine", "a")


def test_folders_that_cannot_be_written_to_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert own_folders(tmp_path / "wandb") == {}
    monkeypatch.setenv("WANDB_DATA_DIR", "/dev/null/data")
    data = {"WANDB_DATA_DIR": str(tmp_path / "wandb" / "wandb_data_dir")}
    assert own_folders(tmp_path / "wandb") == data
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("HOME")
    assert own_folders(tmp_path / "wandb") == data
    monkeypatch.delenv("WANDB_CACHE_DIR")
    assert set(own_folders(tmp_path / "wandb")) == {"WANDB_DATA_DIR", "WANDB_CACHE_DIR"}
