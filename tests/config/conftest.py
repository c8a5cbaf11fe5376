"""Fixtures of the tests of the config."""

import pytest

from selfkd.config import load_config
from selfkd.errors import ConfigError


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a YAML file and returns its path."""

    def write_yaml(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write_yaml


@pytest.fixture
def faults(write):
    """Return a function that loads a config and returns the lines of its ConfigError.

    The path of the YAML file is replaced by run.yaml.
    """

    def find(text="", settings=(), flags=None):
        path = write(text)
        with pytest.raises(ConfigError) as caught:
            load_config(path, settings=settings, flags=flags)
        return str(caught.value).replace(str(path), "run.yaml").splitlines()

    return find
