"""selfkd: born-again generations and ensemble-to-single-model distillation for PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from selfkd.capacity import run_capacity as run_capacity
    from selfkd.cli.result import Result as Result
    from selfkd.deploy import run_deploy as run_deploy
    from selfkd.distill.distiller import Distiller as Distiller
    from selfkd.distill.teacher import Ensemble as Ensemble
    from selfkd.distill.teacher import Teacher as Teacher
    from selfkd.ensemble import run_ensemble as run_ensemble
    from selfkd.generations import run_generations as generations
    from selfkd.generations import run_generations as run_generations
    from selfkd.loading.model import LoadedModel as LoadedModel
    from selfkd.loading.model import load as load
    from selfkd.loading.model import push_to_hub as push_to_hub
    from selfkd.losses import distillation_loss as distillation_loss
    from selfkd.models import make_model as make_model
    from selfkd.soft_targets.cache import cache_logits as cache_logits
    from selfkd.soft_targets.logprobs import import_logprobs as import_logprobs
    from selfkd.soft_targets.reading import SeededView as SeededView
    from selfkd.soft_targets.tokens import load_logits as load_logits
    from selfkd.study import run_study as run_study

# imported when asked for: the command line starts without torch
_HOMES = {
    "Distiller": "selfkd.distill.distiller",
    "Ensemble": "selfkd.distill.teacher",
    "LoadedModel": "selfkd.loading.model",
    "Result": "selfkd.cli.result",
    "SeededView": "selfkd.soft_targets.reading",
    "Teacher": "selfkd.distill.teacher",
    "cache_logits": "selfkd.soft_targets.cache",
    "distillation_loss": "selfkd.losses",
    "import_logprobs": "selfkd.soft_targets.logprobs",
    "load": "selfkd.loading.model",
    "load_logits": "selfkd.soft_targets.tokens",
    "make_model": "selfkd.models",
    "push_to_hub": "selfkd.loading.model",
    "run_capacity": "selfkd.capacity",
    "run_deploy": "selfkd.deploy",
    "run_ensemble": "selfkd.ensemble",
    "run_generations": "selfkd.generations",
    "run_study": "selfkd.study",
}
__all__ = [
    "Distiller",
    "Ensemble",
    "LoadedModel",
    "Result",
    "SeededView",
    "Teacher",
    "__version__",
    "cache_logits",
    "distillation_loss",
    "generations",
    "import_logprobs",
    "load",
    "load_logits",
    "make_model",
    "push_to_hub",
    "run_capacity",
    "run_deploy",
    "run_ensemble",
    "run_generations",
    "run_study",
]


def __getattr__(name: str) -> object:
    if name == "generations":  # a module that can be called
        return importlib.import_module("selfkd.generations")
    if name not in _HOMES:
        raise AttributeError(f"module 'selfkd' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
