"""What a user can import, ask for and call, as Python and as type checkers see it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import sys
from pathlib import Path

import pytest

import selfkd
import selfkd.losses
from selfkd import __main__


def test_public_names_are_listed_and_there() -> None:
    assert set(selfkd.__all__) <= set(dir(selfkd))
    for name in selfkd.__all__:
        assert getattr(selfkd, name) is not None


def test_the_version_is_that_of_the_package() -> None:
    assert selfkd.__version__ == importlib.metadata.version("selfkd")


def test_what_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'selfkd' has no attribute 'Distilller'"):
        selfkd.Distilller  # noqa: B018


def losses() -> list[tuple[str, str]]:
    """Every function and class of a module of losses that is documented by an example."""
    found = []
    for module in pkgutil.iter_modules(selfkd.losses.__path__, "selfkd.losses."):
        for name, value in vars(importlib.import_module(module.name)).items():
            own = getattr(value, "__module__", None) == module.name
            if own and callable(value) and not name.startswith("_") and ">>>" in str(value.__doc__):
                found.append((module.name, name))
    return found


@pytest.mark.parametrize(("module", "name"), losses())
def test_every_public_loss_is_in_selfkd_losses(module: str, name: str) -> None:
    assert getattr(selfkd.losses, name) is getattr(importlib.import_module(module), name)


def test_the_console_script_knows_every_command() -> None:
    here = Path(selfkd.__file__).parent
    modules = {
        path.stem
        for path in here.glob("*.py")
        if re.search(r"^def main\(", path.read_text(), re.M) and path.stem != "__main__"
    }
    assert set(__main__.COMMANDS) == modules | {"config"}  # a package, which can be run


def test_the_console_script_says_its_version(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["selfkd", "--version"])
    assert __main__.main() == 0
    assert capsys.readouterr().out == f"selfkd {selfkd.__version__}\n"


def test_it_is_a_function_with_a_signature() -> None:
    assert callable(selfkd.generations)
    first, *others = inspect.signature(selfkd.run_generations).parameters.values()
    assert first.name == "train_fn"
    assert {other.kind for other in others} == {inspect.Parameter.KEYWORD_ONLY}
