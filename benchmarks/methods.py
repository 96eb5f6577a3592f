"""What a rival's own training costs beside its forward and backward passes.

For each method that trains in a way of its own: one epoch by the shared loop, drawing and
normalising batches, asking teachers, scaling and freezing included; and the bare passes of the same
epoch, on batches that lie prepared: the teacher's forward pass, the loss, its backward pass and the
optimiser's step. Both take turns in one run, each in a process of its own, on made images of
CIFAR's shape, and medians are compared. Prints a Markdown table and writes a CSV file. `make bench
WHAT=methods`, or `python benchmarks/methods.py --help`."""

import copy
from collections.abc import Callable
from dataclasses import fields, replace

import pandas as pd
import torch
from timing import arguments, in_turn, keep, processes, ratios
from training import CLASSES, images

from fisher_unlearn.methods.base import Task, Trained
from fisher_unlearn.methods.unlearn import METHODS
from fisher_unlearn.networks.models import build_model
from fisher_unlearn.networks.objective import Teacher, minimise
from fisher_unlearn.networks.optimizers import make_optimizer

BARE, OURS = "bare passes", "our epoch"
LAYOUT = torch.channels_last


class Noted(Teacher):
    "A teacher that keeps what it was asked."

    def __init__(self, model):
        super().__init__(model)
        self.asked = []

    def __call__(self, inputs):
        self.asked.append(inputs)
        return super().__call__(inputs)


def few(method: Trained, steps: int) -> Trained:
    "The method for one epoch, of so many steps where it counts them itself."
    own = {f.name for f in fields(method)}
    return replace(
        method, **{n: v for n, v in {"own_epochs": 1, "sfron_steps": steps}.items() if n in own}
    )


def epoch(
    network: str, steps: int, batch: int, device: str, name: str, way: str
) -> Callable[[], object]:
    "One epoch of a method, by our loop or bare."
    samples = images(steps * batch)
    tenth = len(samples) // 10
    lost, kept = (
        samples[torch.arange(len(samples)) < tenth],
        samples[torch.arange(len(samples)) >= tenth],
    )
    build = lambda: build_model(network, CLASSES, 3, seed=1).to(device)
    model = build_model(network, CLASSES, 3, seed=0).to(device, memory_format=LAYOUT)
    sets = [part.batches(batch, device) for part in (lost, kept)]
    task = Task(
        *sets, classes=(0,), num_classes=CLASSES, original=copy.deepcopy(model), build=build
    )
    method = few(METHODS[name](), steps)
    mask = {n: torch.rand(p.shape, device=device) > 0.5 for n, p in model.named_parameters()}
    if way == OURS:
        return lambda: minimise(model, method.objective(task, mask))
    vars(task)["teacher"] = Noted(task.original)
    vars(task)["novice"] = Noted(build())
    objective = method.objective(task, mask)
    prepared = list(objective.steps(0))
    usual = {"momentum": objective.momentum, "weight_decay": objective.weight_decay}
    optimizer = make_optimizer(objective.optimizer, model, objective.lr, **usual)
    asked = [(teacher, inputs) for teacher in objective.teachers for inputs in teacher.asked]

    def passes() -> None:
        for teacher, inputs in asked:
            with torch.no_grad():
                teacher.model(inputs)
        model.train()
        for step in prepared:
            loss = step.loss(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return passes


def main() -> None:
    parser = arguments(__doc__, ["resnet20"], 7)
    parser.add_argument("--steps", type=int, default=20, help="of an epoch")
    args = parser.parse_args()
    for network in args.networks:
        rows = []
        for name in sorted(n for n, kind in METHODS.items() if issubclass(kind, Trained)):
            if name == "unsir":  # whose noise is made in its steps
                continue
            asked = (network, args.steps, args.batch, args.device, name)
            with processes(epoch, asked, (BARE, OURS), args.device, args.threads) as clocks:
                found = ratios(in_turn(clocks, args.repeats), BARE)
            rows += [{"method": name, **row} for row in found]
        table = pd.DataFrame(rows)
        keep(table, args.out / f"methods_{network}_{args.device}.csv", args.device, args.threads)


if __name__ == "__main__":
    main()
