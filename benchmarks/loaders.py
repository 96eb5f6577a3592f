"""Every data set, read from its real files, in each of the paper's networks.

An epoch of training on a part of its images, drawn by seed, and FisherMask as in the authors'
code, which takes a forward and a backward pass for each class: does it work, and how long does it
take? Prints Markdown tables and writes CSV files. `make bench WHAT=loaders`, or
`python benchmarks/loaders.py --help`."""

import argparse
import time
import warnings

import pandas as pd
import torch
from timing import arguments, keep

from fisher_unlearn import forget_class, unlearn
from fisher_unlearn.images.data import ImageData, load_images
from fisher_unlearn.networks.metrics import accuracy
from fisher_unlearn.networks.models import build_model
from fisher_unlearn.networks.schedule import Schedule
from fisher_unlearn.networks.train import TrainSettings, train_model

NETWORKS = ["resnet20", "vgg16", "densenet", "googlenet"]
ONCE = TrainSettings(Schedule(epochs=1, drops=(), lr=0.05), select="last")


def tried(images: ImageData, network: str, scored: int, device: str) -> dict[str, object]:
    "One row: an epoch, and the scores of a few images of either set."
    model = build_model(network, len(images.classes), images.train.images.shape[1], seed=0)
    model, request = model.to(device), forget_class(images, 3)
    start = time.perf_counter()
    history = train_model(model, images.train, ONCE, progress="none")
    trained = time.perf_counter() - start
    sets = [part[:scored].batches(scored, device) for part in (request.forget, request.remain)]
    start = time.perf_counter()
    found = unlearn(model, *sets, preset="authors_code", progress="none")
    scoring = time.perf_counter() - start
    return {
        "images": len(images.train),
        "seconds of an epoch": round(trained, 1),
        "loss": round(history.train_loss.iloc[-1], 2),
        "test accuracy": round(accuracy(model, images.test.batches(128, device)), 1),
        "images scored": sum(min(scored, len(p)) for p in (request.forget, request.remain)),
        "seconds to score and mask": round(scoring, 1),
        "entries masked": int(found.changed.masked.sum()),
    }


def measure(data: str, args: argparse.Namespace) -> pd.DataFrame:
    "Rows of a data set."
    torch.set_num_threads(args.threads)
    whole = load_images(data)
    part = whole.subset(args.images, seed=0)
    what = {"classes": len(whole.classes), "pixels": f"{whole.train.images.shape[-1]}²"}
    rows = []
    for network in args.networks:
        with warnings.catch_warnings(action="ignore"):  # that there is a pass for each class
            rows.append(
                {"network": network} | what | tried(part, network, args.scored, args.device)
            )
    return pd.DataFrame(rows)


def main() -> None:
    parser = arguments(__doc__, NETWORKS, 1)
    parser.add_argument(
        "--data", nargs="+", default=["mnist", "cifar10", "cifar100", "tinyimagenet"]
    )
    parser.add_argument("--images", type=int, default=640, help="to train on")
    parser.add_argument("--scored", type=int, default=8, help="of either set")
    args = parser.parse_args()
    for data in args.data:
        table = measure(data, args)
        keep(table, args.out / f"loaders_{data}_{args.device}.csv", args.device, args.threads)


if __name__ == "__main__":
    main()
