"""The mythical digit: a network that has never seen a 3 knows most of them.

    python examples/mythical_digit.py --data PATH --output threes.png

PATH holds torchvision's MNIST folder. A teacher is trained on all ten digits. Its student is
trained on the images of nine, each with the teacher's soft targets: how much like a 3 this 8 is,
how little that 1. It never sees an image of a 3. Then it is shown the 3s of the test set. (Hinton,
Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, section 3,
https://arxiv.org/abs/1503.02531)

Without MNIST, in half a minute and with students on labels alone beside it:
tune_configs/knowledge/mythical_digit.yaml, on embedded digits.

The runs are A1 and A5 of `anchors/`; those that are there already are read. `--tenth` makes a quick
one of a tenth of the epochs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from selfkd.data import load_data
from selfkd.experiments.run_folder import RunFolder
from selfkd.storage.checkpoint import load_tensors
from selfkd.storage.files import load_json

DIGIT = 3
STUDY = "a05_mythical_digit"
COLUMNS, ROWS, SIDE, FRAME = 20, 5, 56, 4
GREEN, BLUE, RED = (0, 150, 80), (40, 90, 220), (215, 40, 40)


def main(argv: Sequence[str] | None = None) -> int:
    """Tell the story and draw the picture; return an exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", metavar="PATH", help="SELFKD_DATA when not given")
    parser.add_argument("--runs", default="runs/anchors", help="folder of the run folders")
    parser.add_argument("--output", default="mythical_digit.png", help="the picture")
    parser.add_argument("--tenth", action="store_true", help="a tenth of the epochs")
    arguments = parser.parse_args(argv)
    run = Path(arguments.runs) / STUDY
    if not (run / "summary.json").exists():
        make = [sys.executable, str(Path(__file__).parent / "anchors" / "run.py"), "a01_teacher"]
        make += [STUDY, "--runs", arguments.runs, *(["--tenth"] if arguments.tenth else [])]
        make += ["--data", arguments.data] if arguments.data else []
        code = subprocess.run(make, check=False).returncode  # noqa: S603 - our own script
        if code:
            return code
    print(story(load_json(run / "summary.json")))
    draw(run, Path(arguments.output), root=arguments.data)
    print(
        f"{arguments.output}: the first {COLUMNS * ROWS} threes of the test set. Framed in green: "
        "right at once; in blue: right with the bias; in red: taken for another digit."
    )
    return 0


def story(summary: dict[str, Any]) -> str:
    """Return the story in words, of the first seed."""
    row = summary["arms"][0]["runs"][0]
    unseen, images = row["unseen"], summary["items"]
    teacher = summary["members"]
    before = unseen["class_accuracy"][DIGIT]
    after = unseen["biased_class_accuracy"][DIGIT]
    return "\n".join(
        [
            f"The teacher errs on {teacher['test_errors']:.0f} of {images:,} test images.",
            f"Its student has seen no image of a {DIGIT}. It errs on {row['test_errors']:.0f}, and "
            f"names {before:.1%} of the {DIGIT}s.",
            f"It takes a {DIGIT} for rare, having met none: its bias for the class is too low.",
            f"With {unseen['bias']:+.2f} on that one number, fitted on held-out training images, "
            f"it errs on {unseen['test_errors']:.0f} and names {after:.1%} of the {DIGIT}s.",
        ]
    )


def draw(run: Path, output: Path, *, root: str | None = None) -> None:
    """Draw the first threes of the test set, framed by what the first student takes them for."""
    _, config = RunFolder.open(run)
    data = load_data(config.data.name, root=root or config.data.root, seed=config.seed)
    row = load_json(run / "summary.json")["arms"][0]["runs"][0]
    predictions = run / "predictions" / f"{row['hash']}.safetensors"
    logits, unseen = load_tensors(predictions)[0]["test"].double(), row["unseen"]
    shifted = logits.clone()
    shifted[:, unseen["classes"]] += unseen["bias"]
    threes = torch.nonzero(data.test.labels == DIGIT).flatten()[: COLUMNS * ROWS]
    step = SIDE + 2 * FRAME
    page = Image.new("RGB", (COLUMNS * step, ROWS * step), "white")
    for place, number in enumerate(threes.tolist()):
        at_once = int(logits[number].argmax()) == DIGIT
        with_bias = int(shifted[number].argmax()) == DIGIT
        colour = GREEN if at_once and with_bias else BLUE if with_bias else RED
        image = data.test.images[number, 0]  # type: ignore[index] - MNIST is in memory
        tile = Image.fromarray(255 - image.numpy()).resize((SIDE, SIDE)).convert("RGB")
        framed = Image.new("RGB", (step - 2, step - 2), colour)
        framed.paste(tile, (FRAME - 1, FRAME - 1))
        page.paste(framed, (place % COLUMNS * step + 1, place // COLUMNS * step + 1))
    output.parent.mkdir(parents=True, exist_ok=True)
    page.save(output, optimize=True)


if __name__ == "__main__":
    raise SystemExit(main())
