"""What a worker does with low bits: it rounds a trained model, without training it further."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from selfkd.config import Tree
from selfkd.deployment.low_bits import describe_rounded, plain, round_weights, sizes_rounded
from selfkd.results import Row
from selfkd.storage.checkpoint import load_tensors, save_tensors
from selfkd.storage.remote import as_path
from selfkd.tasks import make_task


def round_checkpoint(config: Tree, checkpoint: str, bits: int, save: str) -> Iterator[Row]:
    """Round the weights of a model's linear layers as `bits` of its training does.

    Args:
        config: Config of its data.
        checkpoint: File of the model.
        bits: Number of bits.
        save: File for the rounded model.

    Yields:
        `hash` of the rounded model, the `share` of its parameters that are rounded, and `remarks`
        on it; or the user's mistake.
    """
    network, _ = make_task(config).load(checkpoint)
    facts = load_tensors(as_path(checkpoint))[1]
    del facts["hash"]
    sizes = sizes_rounded(network)
    try:
        round_weights(network, bits)
    except ValueError as error:
        yield {"fault": str(error)}
        return
    tensors = plain(network).state_dict()
    digest = save_tensors(as_path(save), tensors, facts | {"bits": bits})
    share = sizes[""] / sizes.total()
    yield {"hash": digest, "share": share, "remarks": [describe_rounded(sizes, bits)]}


JOBS: dict[str, Callable[..., Iterator[Row]]] = {"round_checkpoint": round_checkpoint}
