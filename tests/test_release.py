"""What a release needs: facts that agree, and packages that work where they are installed."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import selfkd

ROOT = Path(__file__).parents[1]
SMALLEST = [
    *("--rounds", "0", "--set", "search.trials=1", "--set", "train.epochs=1"),
    *("--set", "confirm.seeds=0", "--set", "tracking=none"),
]


def test_the_citation_is_of_this_version() -> None:
    """By the required keys of the Citation File Format 1.2.0."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert set(citation) >= {"cff-version", "message", "title", "authors"}
    assert citation["version"] == selfkd.__version__
    for source in (citation, *citation["references"]):
        assert all({"name", "family-names"} & set(author) for author in source["authors"])
        assert source["title"]
        assert source["type"]


def test_the_checks_are_one_script_that_all_call() -> None:
    checks = (ROOT / "scripts" / "check").read_text()
    assert "\nscripts/check\n" in (ROOT / ".ci" / "run").read_text()
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    for hook in local["hooks"]:
        assert hook["language"] == "system"
        assert hook["entry"].removesuffix(" --force-exclude") in checks
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = workflow["jobs"]["test"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]


def run(*command: str | Path, folder: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow  # a minute
def test_the_wheel_works_in_a_new_environment(tmp_path: Path) -> None:
    for tool in ("build", "hatchling", "twine"):
        pytest.importorskip(tool)
    python = sys.executable
    run(python, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", ROOT, folder=ROOT)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    (source,) = (tmp_path / "dist").glob("*.tar.gz")
    assert f"-{selfkd.__version__}-py3-none-any" in wheel.name
    run(python, "-m", "twine", "check", "--strict", wheel, source, folder=tmp_path)

    inside = set(zipfile.ZipFile(wheel).namelist())
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "selfkd").rglob("*.py")}
    assert ours | {"selfkd/py.typed"} <= inside
    assets = {str(path.relative_to(ROOT)) for path in (ROOT / "selfkd/reporting/assets").iterdir()}
    assert assets
    assert assets <= inside
    assert {name.split("/")[0] for name in inside} == {
        *("selfkd", f"selfkd-{selfkd.__version__}.dist-info"),
    }
    with tarfile.open(source) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "tests/conftest.py"} <= names

    home = tmp_path / "environment"
    venv.create(home, with_pip=False)
    (packages,) = home.glob("lib/python*/site-packages")
    known = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "dependencies.pth").write_text("\n".join(known))  # but not what they point to
    new = home / "bin" / "python"
    pip = (python, "-m", "pip", "--python", new, "install", "--quiet")
    run(*pip, "--no-index", "--no-deps", "--ignore-installed", wheel, folder=tmp_path)
    where = run(new, "-c", "import selfkd; print(selfkd.__file__)", folder=tmp_path)
    assert Path(where.strip()) == packages / "selfkd" / "__init__.py"
    version = run(home / "bin" / "selfkd", "--version", folder=tmp_path)
    assert version == f"selfkd {selfkd.__version__}\n"
    printed = run(new, "-m", "selfkd.generations", "--name", "first", *SMALLEST, folder=tmp_path)
    assert "generation 0: val" in printed
    assert (tmp_path / "runs" / "first" / "report.html").stat().st_size > 1e6
