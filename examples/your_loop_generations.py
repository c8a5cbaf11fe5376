"""Born-again generations of a loop that was written for something else: tagging of sequences.

    python examples/your_loop_generations.py
    python examples/your_loop_generations.py confirm.seeds=0    # and any other setting
    python -m selfkd.generations --train examples/your_loop_generations.py:train_tagger --rounds 2

Each token of a random sequence is to be tagged with the sum of it and the one before, modulo 8. Of
the tags that are trained on 30 % are drawn anew, so that there is something to gain; those that are
validated on are right. The loop is plain PyTorch; four lines of it are selfkd's, marked below.
"""

import sys

import torch
from torch import Tensor, nn

import selfkd
from selfkd.training.trial import Trial

TOKENS, LENGTH, EPOCHS, BATCH = 8, 12, 20, 32


class Tagger(nn.Module):
    """A recurrent network, from tokens `[batch, length]` to logits `[batch * length, TOKENS]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, 8)
        self.recurrent = nn.GRU(8, width, batch_first=True)
        self.head = nn.Linear(width, TOKENS)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.recurrent(self.embedding(tokens))
        logits: Tensor = self.head(states).flatten(0, 1)
        return logits


def make_data(sequences: int, *, seed: int, noise: float) -> tuple[Tensor, Tensor]:
    """Return tokens and tags, `[sequences, LENGTH]`, with a share of the tags drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    tokens, drawn = torch.randint(TOKENS, (2, sequences, LENGTH), generator=generator)
    wrong = torch.rand(tokens.shape, generator=generator) < noise
    sums = tokens.clone()
    sums[:, 1:] += tokens[:, :-1]
    return tokens, torch.where(wrong, drawn, sums % TOKENS)


def train_tagger(trial: Trial) -> None:
    """Train one tagger; what selfkd needs of it is marked."""
    torch.manual_seed(trial.seed)
    model = Tagger(trial.params.get("width", 32))
    distiller = trial.distiller(model)  # selfkd
    optimizer = torch.optim.Adam(model.parameters(), lr=trial.params.get("lr", 0.01))
    tokens, tags = make_data(200, seed=1, noise=0.3)
    val_tokens, val_tags = make_data(500, seed=2, noise=0.0)
    for _ in range(EPOCHS):
        model.train()
        for index in torch.randperm(len(tokens)).split(BATCH):
            logits = model(tokens[index])
            labels = tags[index].flatten()
            terms = distiller(logits, labels, inputs=tokens[index])  # selfkd
            optimizer.zero_grad()
            terms["loss"].backward()  # selfkd
            optimizer.step()
        model.eval()
        with torch.no_grad():
            right = model(val_tokens).argmax(1) == val_tags.flatten()
        accuracy = right.float().mean().item()
        trial.report({"val_accuracy": accuracy, **values(terms)}, student=model)  # selfkd


def values(terms: dict[str, Tensor]) -> dict[str, float]:
    """Return the terms of a loss as numbers."""
    return {name: value.item() for name, value in terms.items()}


if __name__ == "__main__":
    results = selfkd.generations(
        train_tagger,
        rounds=2,
        trials=3,
        space={
            "params.lr": {"loguniform": [7e-3, 1.5e-2]},
            "distill.temperature": {"loguniform": [1.5, 6]},
            "distill.alpha": {"uniform": [0.6, 1]},
        },
        settings=["tracking=none", "confirm.seeds=5", *sys.argv[1:]],
    )
    for result in results.summary.generations:
        accuracy = result.metrics["val_accuracy"]
        print(f"generation {result.generation}: {accuracy:.1%} of the tags right")
