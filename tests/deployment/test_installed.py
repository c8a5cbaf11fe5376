"""Tests of what is known of the packages of the extra `deploy`."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest
import torch

from selfkd import deployment
from selfkd.errors import ConfigError


def test_missing_packages_are_named_with_the_line_that_installs_them(monkeypatch):
    deployment.check_installed()
    missing = ("onnxruntime", "torch_pruning")
    monkeypatch.setattr(deployment, "find_spec", lambda name: None if name in missing else name)
    with pytest.raises(ConfigError) as caught:
        deployment.check_installed()
    assert str(caught.value) == (
        "selfkd.deploy needs onnxruntime, torch-pruning, not installed here: "
        "pip install 'selfkd[deploy]'"
    )


def test_versions_are_those_of_installed_libraries(monkeypatch):
    assert deployment.versions()["torch"].partition("+")[0] == torch.__version__.partition("+")[0]

    def version(name):
        if name != "onnx":
            raise PackageNotFoundError(name)
        return "1.2.3"

    monkeypatch.setattr(deployment, "version", version)
    assert deployment.versions() == {"onnx": "1.2.3"}
