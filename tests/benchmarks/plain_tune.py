"""Born-again generations and an ensemble's student as a careful person writes them with Ray Tune.

    python tests/benchmarks/plain_tune.py generations --root MNIST [--rounds 2] [--trials 8]
    python tests/benchmarks/plain_tune.py ensemble --root MNIST [--members 10] [--trials 8]

One Tuner a generation, actors reused, one core a trial, data put into the object store once, the
teacher (or the ensemble) run live in eval mode at every step, the best trial by validation accuracy
teaches the next. No seeds, controls, report or tracking: what selfkd's `confirm.seeds=0
tracking=none` does. `search.py` runs both.
"""

import argparse
import os
import pathlib
import tempfile
import time

os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")

import ray
import torch
from ray import tune
from torch import nn
from torch.nn import functional as F
from torchvision.datasets import MNIST


def net(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 10),
    )


def train(config: dict, data=None) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(config["seed"])
    x, y, val_x, val_y = data
    student = net(config["width"])
    teachers = []
    for path in config["teachers"]:
        teacher = net(config["teacher_width"])
        teacher.load_state_dict(torch.load(path, weights_only=True))
        teachers.append(teacher.eval().requires_grad_(False))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, config["epochs"] * -(-len(x) // 128)
    )
    temperature, alpha = config.get("temperature", 1.0), config.get("alpha", 0.0)
    for epoch in range(config["epochs"]):
        student.train()
        for index in torch.randperm(len(x)).split(128):
            inputs = x[index]
            logits = student(inputs)
            loss = F.cross_entropy(logits, y[index])
            if teachers:
                with torch.no_grad():
                    target = torch.stack(
                        [F.softmax(t(inputs) / temperature, 1) for t in teachers]
                    ).mean(0)
                soft = F.kl_div(
                    F.log_softmax(logits / temperature, 1), target, reduction="batchmean"
                )
                loss = (1 - alpha) * loss + alpha * temperature**2 * soft
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        student.eval()
        with torch.no_grad():
            accuracy = (student(val_x).argmax(1) == val_y).float().mean().item()
        last = epoch == config["epochs"] - 1
        if last:
            with tempfile.TemporaryDirectory() as folder:
                torch.save(student.state_dict(), pathlib.Path(folder, "student.pt"))
                tune.report(
                    {"accuracy": accuracy}, checkpoint=tune.Checkpoint.from_directory(folder)
                )
        else:
            tune.report({"accuracy": accuracy})


def search(name, folder, data, space, trials):
    trainable = tune.with_resources(tune.with_parameters(train, data=data), {"cpu": 1})
    tuner = tune.Tuner(
        trainable,
        param_space={**space, "seed": tune.randint(0, 2**31)},
        tune_config=tune.TuneConfig(
            metric="accuracy", mode="max", num_samples=trials, reuse_actors=True
        ),
        run_config=tune.RunConfig(name=name, storage_path=str(folder), verbose=0),
    )
    results = tuner.fit()
    best = results.get_best_result()
    found = [str(pathlib.Path(r.checkpoint.path, "student.pt")) for r in results]
    print(f"{name}: {best.metrics['accuracy']:.4f} at {time.time() - START:.1f} s", flush=True)
    return str(pathlib.Path(best.checkpoint.path, "student.pt")), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["generations", "ensemble"])
    parser.add_argument("--root", required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--members", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--width", type=int, default=800, help="units of the students")
    parser.add_argument("--teacher-width", type=int, default=800, help="units of what teaches")
    options = parser.parse_args()
    ray.init(include_dashboard=False, log_to_driver=False, num_cpus=2)
    mnist = MNIST(options.root)
    x = (mnist.data.reshape(-1, 784).float() / 255 - 0.1307) / 0.3081
    data = (x[:50_000], mnist.targets[:50_000], x[50_000:], mnist.targets[50_000:])
    taught = {"temperature": tune.loguniform(1, 20), "alpha": tune.uniform(0, 1)}
    if (
        options.what == "generations"
        and options.rounds > 1
        and options.width != options.teacher_width
    ):
        parser.error("--rounds must be 1 with another --teacher-width")
    base = {
        "epochs": options.epochs,
        "width": options.width,
        "teacher_width": options.teacher_width,
    }
    first = {**base, "width": options.teacher_width, "teachers": []}
    with tempfile.TemporaryDirectory() as folder:
        if options.what == "generations":
            best, _ = search("generation_0", folder, data, first, options.trials)
            for generation in range(1, options.rounds + 1):
                best, _ = search(
                    f"generation_{generation}",
                    folder,
                    data,
                    {**base, **taught, "teachers": [best]},
                    options.trials,
                )
        else:
            _, members = search("members", folder, data, first, options.members)
            search("student", folder, data, {**base, **taught, "teachers": members}, options.trials)
        ray.shutdown()
    print(f"plain Ray Tune, {options.what}: {time.time() - START:.1f} s")


START = time.time()
if __name__ == "__main__":
    main()
