"""Tests of the check for the packages of the extra `deploy`."""

from __future__ import annotations

import pytest

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
