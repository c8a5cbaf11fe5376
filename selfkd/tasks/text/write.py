"""Text that teachers write on the training prompts: written once, read by any number of students.

    ROOT/<teacher>/<prompts>/shard_00000.jsonl

with the hash of the teacher and that of prompts and sampling; beside each shard its own hash, in
shard_00000.json. A shard is written whole, by draws that depend on teacher, sampling and shard
alone, so that one that is missing or damaged is made again bit for bit. A line is a text, as
`data.name: text` reads it too: so a teacher of one tokenizer can write for students of another.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfkd.results import Written
from selfkd.soft_targets.manifest import store_path
from selfkd.soft_targets.upkeep import remember_user
from selfkd.storage.checkpoint import load_tensors
from selfkd.storage.files import load_json, parse_json, read_text, save_json, save_text
from selfkd.storage.remote import as_path
from selfkd.tasks.text.data import Tokens
from selfkd.tasks.text.generate import generate
from selfkd.tasks.text.networks import TextNetworks
from selfkd.tasks.text.tokenizer import read_tokenizer
from selfkd.training.trial import Trial

FORMAT = 1
_TEACHER = re.compile(r"[0-9a-f]{16,64}")


@dataclass(frozen=True)
class Text:
    """What a teacher wrote after a prompt."""

    window: int
    """Number of the training window whose prompt it follows."""
    ids: tuple[int, ...]
    """Tokens after the prompt, the end token included where it came to that."""


class WrittenText:
    """Text that teachers write on the training prompts of a task.

    Shard n is text number n // parts of the prompts in part n % parts of the training text, which
    is divided as for cached logits, by `targets.shard_size`.

    Args:
        task: Text and networks.
        root: Folder of all that teachers write.
    """

    def __init__(self, task: TextNetworks, root: Path) -> None:
        self._task, self._root, self._write = task, root, task.config.write
        self._data, self._tokens = task.data, task.data.splits["train"]
        self._examples = task.data.examples["train"]
        self._parts = -(-len(self._tokens) // task.config.targets.shard_size)
        self.shards = self._parts * self._write.samples

    @cached_property
    def _prompts(self) -> list[Tensor]:
        return self._tokens.prompts(range(self._tokens.windows))

    @cached_property
    def _tokenizer(self) -> Any:
        return read_tokenizer(self._data.tokenizer)

    @cached_property
    def key(self) -> str:
        """Hash of prompts, tokenizer, context, sampling and shards."""
        write, size = self._write, self._task.config.targets.shard_size
        sampling = [write.temperature, write.top_p, write.samples, write.seed]
        parts = [self._data.context, size, len(self._tokens), *sampling]
        digest = hashlib.sha256(f"{parts} {self._data.tokenizer}".encode())
        for prompt in self._prompts:
            digest.update(f" {prompt.tolist()}".encode())
        return digest.hexdigest()[:16]

    def write(self, checkpoint: str, shard: int, *, run: Path) -> tuple[str, Written]:
        """Write a shard by a teacher, unless it is there.

        Args:
            checkpoint: File of the teacher.
            shard: Number of the shard.
            run: Run folder that uses it.

        Returns:
            `kept`, `written`, or `remade` where what was there was damaged; and its numbers.
        """
        teacher = str(load_tensors(as_path(checkpoint))[1]["hash"])
        remember_user(self._root, teacher, self.key, run)
        try:
            return "kept", self._count(self.read(teacher, shard))
        except FileNotFoundError:
            state = "written"
        except ValueError:
            state = "remade"
        seed = hashlib.sha256(f"{teacher} {self.key} {shard}".encode()).digest()
        windows = self._windows(shard)
        written = generate(
            self._task.load(checkpoint)[0],
            [self._prompts[window] for window in windows],
            end=self._data.end,
            context=self._data.context,
            seed=int.from_bytes(seed[:7], "big"),
            temperature=self._write.temperature,
            top_p=self._write.top_p,
        )
        texts = [
            Text(window, tuple(ids.tolist())) for window, ids in zip(windows, written, strict=True)
        ]
        lines = "".join(f"{json.dumps(self._line(text), ensure_ascii=False)}\n" for text in texts)
        path = self._path(teacher, shard)
        save_text(path, lines)
        save_json(path.with_suffix(".json"), _facts(teacher, self.key, shard, lines))
        return state, self._count(texts)

    def read(self, teacher: str, shard: int) -> list[Text]:
        """Return the texts of a shard, in the order of their prompts.

        Args:
            teacher: Hash of the teacher.
            shard: Number of the shard.

        Raises:
            FileNotFoundError: It is not written.
            ValueError: It is damaged; the message names it.
        """
        path = self._path(teacher, shard)
        lines, known = read_text(path), load_json(path.with_suffix(".json"))
        try:
            if known != _facts(teacher, self.key, shard, lines):
                raise ValueError(f"its hash must be that in {path.with_suffix('.json').name}")
            found = [self._parse(parse_json(line)) for line in lines.split("\n")[:-1]]
            if [text.window for text in found] != list(self._windows(shard)):
                raise ValueError("it must have a text for each prompt")
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): remove it and resume") from None
        return found

    def load(self, teachers: Sequence[Mapping[str, Any]]) -> Tokens:
        """Return what teachers have written as text to train on, whose prompts are not predicted.

        That of several teachers is taken together, so that each text is a draw from the average of
        their distributions; where they have weights, its tokens have that of its teacher.

        Args:
            teachers: `hash` and perhaps `weight` of each.

        Raises:
            FileNotFoundError: A teacher has not written yet.
            ValueError: A file is damaged, or no text is right with `write.keep: right`.
        """
        mean = sum(row.get("weight", 1.0) for row in teachers) / len(teachers)
        pieces: list[tuple[Text, float]] = []
        for row in teachers:
            weight = row.get("weight", 1.0) / mean
            for shard in range(self.shards) if weight > 0 else ():
                texts = self.read(row["hash"], shard)
                kept = self._right(texts) if self._write.keep == "right" else texts
                pieces += [(text, weight) for text in kept if text.ids]
        if not pieces:
            raise ValueError(
                f"write.keep must be all where no text is kept, got {self._write.keep}"
            )
        return self._join(pieces)

    def _join(self, pieces: Sequence[tuple[Text, float]]) -> Tokens:
        """Return texts after their prompts, each in a window of its own.

        The last token of a text is the first of the next prompt where they are the same, as the end
        token is with examples. Else the last row of a window predicts nothing, and of a window that
        is one token longer than the context that token is left out.
        """
        ids, starts, weights, size = list[int](), list[int](), list[float](), 0
        firsts = [int(self._prompts[text.window][0]) for text, _ in pieces]
        for (text, weight), following in zip(pieces, [*firsts[1:], self._data.end], strict=True):
            prompt = self._prompts[text.window].tolist()
            own = [*prompt, *text.ids]
            each = [0.0] * (len(prompt) - 1) + [weight * w for w in self._weights(text)]
            if own[-1] == following:
                own.pop()
            else:
                own = own[: self._data.context]
                each = [*each[: len(own) - 1], 0.0]
            starts.append(len(ids))
            ids += own
            weights += each
            size += len(self._decode(text.ids).encode())
        return Tokens(
            torch.tensor([*ids, self._data.end], dtype=torch.int64),
            self._data.context,
            size,
            torch.tensor(starts, dtype=torch.int64),
            torch.tensor(weights, dtype=torch.float32),
        )

    def _weights(self, text: Text) -> list[float]:
        """Return the weight of each token: as many as the completion has, at the end, weigh 1."""
        weight = self._task.config.data.rationale_weight
        example = self._examples[text.window] if self._examples else None
        if weight == 1 or example is None or not example.rationale:
            return [1.0] * len(text.ids)
        completion = self._tokenizer.encode(example.completion, add_special_tokens=False).ids
        before = max(len(text.ids) - len(completion) - self._has_end(text), 0)
        return [weight] * before + [1.0] * (len(text.ids) - before)

    def _count(self, texts: Sequence[Text]) -> Written:
        if not self._examples:  # a document goes on beyond its window
            return Written(texts=len(texts))
        cut = sum(not self._has_end(text) for text in texts)
        return Written(texts=len(texts), cut=cut, right=len(self._right(texts)))

    def _right(self, texts: Sequence[Text]) -> list[Text]:
        """Return the texts that end in the completion of their prompt."""
        return [
            text
            for text in texts
            if self._has_end(text) and self._examples[text.window].is_right(self._decode(text.ids))
        ]

    def _has_end(self, text: Text) -> bool:
        return text.ids[-1:] == (self._data.end,)

    def _windows(self, shard: int) -> range:
        """Return the windows that begin in the part of a shard."""
        size, part = self._task.config.targets.shard_size, shard % self._parts
        ends = torch.tensor([part * size, (part + 1) * size])
        first, last = torch.searchsorted(self._tokens.bounds[:-1].contiguous(), ends).tolist()
        return range(first, last)

    def _line(self, text: Text) -> dict[str, Any]:
        """Return a text as it is written: for people, and as the tokens that are read."""
        return {
            "window": text.window,
            "prompt": self._decode(self._prompts[text.window].tolist()),
            "completion": self._decode(text.ids),
            "ids": list(text.ids),
        }

    def _decode(self, ids: Sequence[int]) -> str:
        """Return tokens as text, without end tokens."""
        own = [each for each in ids if each != self._data.end]
        found: str = self._tokenizer.decode(own, skip_special_tokens=False)  # others are text
        return found

    def _parse(self, line: Any) -> Text:
        """Return the text of a line of a file of unknown origin."""
        window, ids = (
            line.get(key) if isinstance(line, dict) else None for key in ("window", "ids")
        )
        if type(window) is not int or not 0 <= window < self._tokens.windows:
            raise ValueError(f"window must be one of the training text, got {window!r}")
        if not isinstance(ids, list) or not all(
            type(each) is int and 0 <= each < self._data.vocabulary for each in ids
        ):
            raise ValueError(f"ids must be tokens, in the text of window {window}")
        room = self._data.context + 1 - len(self._prompts[window])
        if len(ids) > room:
            raise ValueError(f"ids must be at most {room}, got {len(ids)} in window {window}")
        return Text(window, tuple(ids))

    def _path(self, teacher: str, shard: int) -> Path:
        if not _TEACHER.fullmatch(teacher):
            raise ValueError(f"teacher must be a hash, got {teacher!r}")
        return store_path(self._root, teacher, self.key) / f"shard_{shard:05d}.jsonl"


def training_text(task: TextNetworks, trial: Trial) -> Tokens:
    """Return what a student is trained on: the training text, or what its teachers have written.

    Args:
        task: Text and networks.
        trial: Student and its teachers.
    """
    if not trial.teachers or trial.config.distill.mode == "tokens":
        return task.data.splits["train"]
    return WrittenText(task, trial.targets).load(trial.teachers)


def _facts(teacher: str, key: str, shard: int, lines: str) -> dict[str, Any]:
    digest = hashlib.sha256(lines.encode()).hexdigest()
    return {
        "format": FORMAT,
        "teacher": teacher,
        "prompts": key,
        "shard": shard,
        "sha256": digest,
    }
