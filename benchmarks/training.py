"""What our loops cost beside bare ones: an epoch of training, evaluation, and the scores that
are read from activations.

All ways take turns in one run, each in a process of its own, on made images of CIFAR's shape,
and medians are compared. The bare epoch is forward, backward and
step on batches that are prepared beforehand; the loop that one would write first reads images
one by one through torchvision's transforms and a DataLoader with
two workers, in the default layout. It gives freed memory back, as processes do, and so does a
second bare epoch. Our epoch is also measured compiled and in bfloat16. The floor is what the
machine needs
for an epoch's multiplications in large matrix products, and for copying as many bytes as its
other operators read and write. Prints Markdown tables and writes CSV files. `make bench`, or
`python benchmarks/training.py --help`."""

import argparse
import json
from collections.abc import Callable

import pandas as pd
import torch
import torch.nn.functional as F
from timing import arguments, in_turn, keep, peak_elsewhere, peak_of, processes, ratios
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from tqdm import tqdm

from fisher_unlearn.scores.activation import activation_scores
from fisher_unlearn.images.data import Samples
from fisher_unlearn.networks.metrics import accuracy
from fisher_unlearn.networks.models import build_model
from fisher_unlearn.networks.step import Way, forward_in
from fisher_unlearn.scores.tfidf import tfidf_scores
from fisher_unlearn.networks.train import TrainSettings, train_epoch
from fisher_unlearn.networks.machine import keep_freed_memory

CLASSES, MEAN, STD = 10, (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
BARE, OURS = "bare loop", "train_epoch"
OPTIONS = {
    f"{OURS}, {', '.join(how)}": {
        "compile": "compiled" in how,
        "precision": "bfloat16" if "bfloat16" in how else "float32",
    }
    for how in (["compiled"], ["bfloat16"], ["compiled", "bfloat16"])
}
GIVEN_BACK, FIRST = AS_THEY_ARE = "bare loop, freed memory given back", "torchvision and DataLoader"
FLOOR = PRODUCTS, COPIES = (
    "its multiplications, in matrix products",
    "its other operators' bytes, copied",
)
FORWARD, READINGS = (
    "bare forward pass",
    {"evaluation": "accuracy", "activations": "activation_scores", "tf-idf": "tfidf_scores"},
)


def images(n: int) -> Samples:
    "Made images and labels."
    g = torch.Generator().manual_seed(0)
    return Samples(
        torch.randint(256, (n, 3, 32, 32), generator=g, dtype=torch.uint8),
        torch.randint(CLASSES, (n,), generator=g),
        MEAN,
        STD,
        32,
    )


class OneByOne(Dataset):
    "Images as torchvision's CIFAR10 gives them: from an array, through PIL and the transforms."

    def __init__(self, samples: Samples):
        self.pixels, self.labels = (
            samples.images.permute(0, 2, 3, 1).numpy(),
            samples.labels.tolist(),
        )
        self.transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        )

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.pixels[i])), self.labels[i]


class Traffic(TorchDispatchMode):
    "Bytes that operators read and write, those of matrix products and convolutions aside."

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if not func.is_view and not flop_registry.get(func.overloadpacket):
            self.nbytes += sum(
                t.nbytes for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)
            )
        return result


def floor(train: Callable[[], object], device: str, way: str) -> Callable[[], object]:
    """The multiplications of an epoch in large matrix products, or the bytes of its other
    operators in large copies."""
    with FlopCounterMode(display=False) as flops, Traffic() as traffic:
        train()
    n = 2048
    a, b, c = (torch.rand(n, n, device=device) for _ in range(3))
    work, once, do = (
        (flops.get_total_flops(), 2 * n**3, lambda: torch.mm(a, b, out=c))
        if way == PRODUCTS
        else (traffic.nbytes, 2 * a.nbytes, lambda: c.copy_(a))
    )
    times = round(work / once)

    def repeat() -> None:
        for _ in range(times):
            do()

    return repeat


def epoch(network: str, steps: int, batch: int, device: str, way: str) -> Callable[[], object]:
    "One epoch of a way, with a model and an optimiser of its own."
    samples, settings = (
        images(steps * batch),
        TrainSettings(batch_size=batch, **OPTIONS.get(way, {})),
    )
    layout = torch.contiguous_format if way == FIRST else torch.channels_last
    model = build_model(network, CLASSES, 3, seed=0).to(device, memory_format=layout).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    batches = samples.batches(batch, device)
    if way == OURS or way in OPTIONS:
        forward = forward_in(model, Way(settings.compile, settings.precision))
        return lambda: train_epoch(
            model, batches, optimizer, settings, 0, steps, CLASSES, tqdm(disable=True), forward
        )
    given = (
        DataLoader(OneByOne(samples), batch, shuffle=True, num_workers=2)
        if way == FIRST
        else [(x.contiguous(memory_format=layout), y) for x, y in batches]
    )

    def train() -> None:
        for x, y in given:
            loss = F.cross_entropy(model(x.to(device)), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return floor(train, device, way) if way in FLOOR else train


def reading(network: str, n: int, device: str, what: str, way: str) -> Callable[[], object]:
    "A pass over images in evaluation mode: ours, or a bare forward pass of the same images."
    samples = images(n)
    model = (
        build_model(network, CLASSES, 3, seed=0)
        .to(device, memory_format=torch.channels_last)
        .eval()
    )
    parts = {
        "evaluation": [samples.batches(500, device)],
        "tf-idf": [samples.batches(128, device)],
        "activations": [
            samples[index].batches(128, device)
            for index in (torch.arange(n // 10), torch.arange(n // 10, n))
        ],
    }[what]
    if way == READINGS[what]:
        return {
            "evaluation": lambda: accuracy(model, *parts),
            "tf-idf": lambda: tfidf_scores(model, *parts, [0], batches=0),
            "activations": lambda: activation_scores(model, *parts),
        }[what]
    prepared = [
        x.contiguous(memory_format=torch.channels_last) for batches in parts for x, _ in batches
    ]

    @torch.inference_mode()
    def forward() -> None:
        for x in prepared:
            model(x)

    return forward


def peak(network: str, way: str, steps: int, batch: int, device: str, threads: int) -> float:
    "MB that an epoch needs above what a fresh process has before anything of it is made."
    torch.set_num_threads(threads)
    keep_freed_memory()
    epoch(network, 1, 2, device, way)()  # libraries take what they keep
    return peak_of(lambda: epoch(network, steps, batch, device, way)())


def measure(network: str, args: argparse.Namespace) -> pd.DataFrame:
    "Rows of medians and ratios: training, then each reading."
    with processes(
        epoch,
        (network, args.steps, args.batch, args.device),
        (BARE, OURS, *OPTIONS, *FLOOR, *AS_THEY_ARE),
        args.device,
        args.threads,
        AS_THEY_ARE,
    ) as clocks:
        rows = [
            {"what": "training", "images": args.steps * args.batch, **row}
            for row in ratios(in_turn(clocks, args.repeats), BARE)
        ]
    for what, ours in READINGS.items():
        with processes(
            reading,
            (network, args.images, args.device, what),
            (FORWARD, ours),
            args.device,
            args.threads,
        ) as clocks:
            rows += [
                {"what": what, "images": args.images, **row}
                for row in ratios(in_turn(clocks, args.repeats), FORWARD)
            ]
    if args.device == "cpu":
        for row in rows[:2]:
            row["peak_mb"] = round(
                peak_elsewhere(
                    __file__, network, row["way"], args.steps, args.batch, args.device, args.threads
                )
            )
    return pd.DataFrame(rows)


def main() -> None:
    parser = arguments(__doc__, ["resnet20"], 9)
    parser.add_argument("--steps", type=int, default=50, help="of an epoch")
    parser.add_argument("--images", type=int, default=10_000, help="to evaluate and to score")
    args = parser.parse_args()
    if args.peak:
        return print(peak(*json.loads(args.peak)))
    for network in args.networks:
        keep(
            measure(network, args),
            args.out / f"training_{network}_{args.device}.csv",
            args.device,
            args.threads,
        )


if __name__ == "__main__":
    main()
