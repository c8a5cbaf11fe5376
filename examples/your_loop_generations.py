"""Born-again generations of a loop that was written for something else: tagging of sequences.

    python examples/your_loop_generations.py
    python -m selfkd.generations --train examples/your_loop_generations.py:train_tagger --rounds 2

Each token of a random sequence is to be tagged with whether the number of ones so far is even. The
loop is plain PyTorch; four lines of it are selfkd's, marked below.
"""

import torch
from torch import Tensor, nn

import selfkd
from selfkd.training.trial import Trial

LENGTH, EPOCHS, BATCH = 12, 6, 32


class Tagger(nn.Module):
    """A recurrent network with two logits a token: `[batch, length]` to `[batch * length, 2]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2, 8)
        self.recurrent = nn.GRU(8, width, batch_first=True)
        self.head = nn.Linear(width, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.recurrent(self.embedding(tokens))
        logits: Tensor = self.head(states).flatten(0, 1)
        return logits


def make_data(sequences: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return tokens and tags, `[sequences, LENGTH]`; a tenth of the tags is wrong."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, (sequences, LENGTH), generator=generator)
    noise = (torch.rand(tokens.shape, generator=generator) < 0.1).long()
    return tokens, (tokens.cumsum(1) + noise) % 2


def train_tagger(trial: Trial) -> None:
    """Train one tagger; what selfkd needs of it is marked."""
    torch.manual_seed(trial.seed)
    model = Tagger(trial.params.get("width", 24))
    distiller = trial.distiller(model)  # selfkd
    optimizer = torch.optim.Adam(model.parameters(), lr=trial.params.get("lr", 0.01))
    tokens, tags = make_data(400, seed=1)
    val_tokens, val_tags = make_data(300, seed=2)
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
            "params.lr": {"loguniform": [3e-3, 3e-2]},
            "distill.temperature": {"loguniform": [1, 8]},
            "distill.alpha": {"uniform": [0, 1]},
        },
        settings=["tracking=none"],
    )
    for result in results.summary.generations:
        accuracy = result.metrics["val_accuracy"]
        print(f"generation {result.generation}: {accuracy:.1%} of the tags right")
