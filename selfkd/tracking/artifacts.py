"""What a run makes and uses, as artifacts of W&B: models and cached teacher logits."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from selfkd.config import Config
from selfkd.results import STUDENT, DeploySummary, GenerationResult, Row, is_measured
from selfkd.storage.files import fetch, load_json
from selfkd.storage.remote import RemotePath, as_path
from selfkd.tracking.run import LoggedRun, make_artifact

MANIFEST = ("teacher", "data", "views", "images", "classes", "top_k", "samples")

Make = Callable[[], Any]


class Artifacts:
    """The artifacts of a run.

    Args:
        config: Config of the run.
        name: Name of the run, with which those of its artifacts begin.
        folder: Run folder.
    """

    def __init__(self, config: Config, *, name: str, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._name = re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:100]
        self._models: dict[str, Make] = {}

    def model(self, path: Path, facts: Row, *, kind: str = "student") -> Make | None:
        """Return the maker of a model's artifact; None where its file is not there.

        Args:
            path: Checkpoint of the model.
            facts: Facts that are shown beside it, its `hash` among them.
            kind: Kind of the model, with which the artifact's name ends.
        """
        if not path.exists():
            return None
        file = fetch(path)
        facts = {"data": self._config.data.name, **facts}

        def make() -> Any:
            return make_artifact(f"{self._name}-{kind}", "model", facts=facts, file=file)

        self._models[facts["hash"]] = make
        return make

    def models(self, result: GenerationResult) -> list[tuple[str, Make | None]]:
        """Return the alias and the maker of each model of a generation, the chosen one first."""
        generation, config = result.generation, self._config
        network = config.network(generation)
        shared = {
            "generation": generation,
            "model": network.name,
            "teachers": [teacher.hash for teacher in result.teachers],
        }
        measured = {name: v for name, v in result.metrics.items() if is_measured(name)}
        own = {"temperature": result.temperature, "alpha": result.alpha, **measured}
        found = []
        for rank, model in enumerate(result.models):
            facts = {**shared, "hash": model.hash, "rank": rank}
            if not rank:
                facts |= {key: value for key, value in own.items() if value is not None}
            alias = f"generation-{generation}" + (f"-rank-{rank}" if rank else "")
            path = model.checkpoint
            found.append((alias, self.model(self._folder / path, facts) if path else None))
        return found

    def deployed(self, summary: DeploySummary, file: Path) -> tuple[Make, Make | None]:
        """Return the makers of the artifact of what is served, and of the model it was made of.

        Args:
            summary: What was deployed.
            file: File of the summary, which is put beside those that are served.
        """
        named = {name: self._folder / path for name, path in summary.files.items()}
        named[file.name] = file
        files = {name: fetch(path) for name, path in named.items() if path.exists()}
        facts = {"data": self._config.data.name, "hash": summary.model, "served": summary.served}

        def make() -> Any:
            name = f"{self._name}-deployed"
            return make_artifact(name, "model", facts=facts, files=files)

        student = self._folder / STUDENT  # of an ensemble, which no generation has
        if summary.model and summary.model not in self._models and student.exists():
            self.model(student, {"hash": summary.model})
        return make, self._models.get(summary.model)

    def use(self, run: LoggedRun | None, teachers: Sequence[str], keeper: LoggedRun | None) -> None:
        """Log that a run uses teachers, and their cached logits where there are any.

        Args:
            run: Run of the student; None where it has none.
            teachers: Hashes of the teachers.
            keeper: Run that the cached logits are artifacts of.
        """
        for teacher in teachers:
            if run is not None and teacher in self._models:
                run.add_artifact(self._models[teacher], used=True)
            for targets in self._targets(teacher):
                if keeper is not None:
                    keeper.add_artifact(targets, aliases=[f"teacher-{teacher}"], once=teacher)
                if run is not None:
                    run.add_artifact(targets, used=True)

    def _targets(self, teacher: str) -> list[Make]:
        root = self._config.targets.root
        store = self._folder / "targets" if root is None else as_path(root).expanduser()
        manifests = sorted((store.absolute() / teacher).glob("*/manifest.json"))
        return [self._make_targets(manifest) for manifest in manifests]

    def _make_targets(self, manifest: Path) -> Make:
        known = load_json(manifest)
        given = known if isinstance(known, dict) else {}
        facts = {k: given[k] for k in MANIFEST if isinstance(given.get(k), str | int)}
        remote = isinstance(manifest, RemotePath)
        reference = str(manifest) if remote else manifest.as_uri()
        folder = manifest.parent if self._config.tracking.upload_targets and not remote else None

        def make() -> Any:
            return make_artifact(
                f"{self._name}-soft-targets",
                "dataset",
                facts=facts,
                description="a teacher's logits for each image and view",
                folder=folder,
                reference=None if folder else reference,
            )

        return make
