"""What a worker does with low bits: it rounds a trained model, without training it further."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from selfkd.config import ModelConfig, Tree
from selfkd.deployment.low_bits import describe_rounded, plain, round_weights
from selfkd.results import Row
from selfkd.storage.remote import as_path
from selfkd.tasks import make_task
from selfkd.worker.prune import check_data


def round_checkpoint(config: Tree, checkpoint: str, bits: int, save: str) -> Iterator[Row]:
    """Round the weights of a model's linear layers as `bits` of its training does.

    Args:
        config: Config of its data.
        checkpoint: File of the model.
        bits: Number of bits.
        save: File for the rounded model.

    Yields:
        `hash` of the rounded model and `remarks` on what is rounded; or the user's mistake.
    """
    task = make_task(config)
    try:
        network, facts = task.load(checkpoint)
        model, said = ModelConfig.of_checkpoint(facts.model), describe_rounded(network, bits)
        round_weights(network, bits)
        digest = task.save(as_path(save), plain(network), model, {"bits": bits})
        check_data(checkpoint, save, "--bits")
    except ValueError as error:
        yield {"fault": str(error)}
        return
    yield {"hash": digest, "remarks": [said]}


JOBS: dict[str, Callable[..., Iterator[Row]]] = {"round_checkpoint": round_checkpoint}
