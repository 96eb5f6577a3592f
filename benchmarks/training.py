"""What our loops cost beside bare ones: an epoch of training, evaluation, and the scores that are read from activations.

All ways take turns in one run, on made images of CIFAR's shape, and medians are compared. The bare epoch is forward, backward and step on batches that are prepared beforehand; the loop that one would write
first reads images one by one through torchvision's transforms and a DataLoader with two workers, in the default layout. Prints Markdown tables and writes
CSV files. `make bench`, or `python benchmarks/training.py --help`."""
import json
from collections.abc import Callable

import pandas as pd
import torch
import torch.nn.functional as F
from timing import arguments, in_turn, keep, peak_elsewhere, peak_of, ratios
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from tqdm import tqdm

from fisher_unlearn.activation import activation_scores
from fisher_unlearn.data import Samples
from fisher_unlearn.metrics import accuracy
from fisher_unlearn.models import build_model
from fisher_unlearn.tfidf import tfidf_scores
from fisher_unlearn.train import TrainSettings, train_epoch

CLASSES, MEAN, STD = 10, (.49, .48, .45), (.25, .24, .26)
BARE, OURS, FIRST = "bare loop", "train_epoch", "torchvision and DataLoader"


def images(n: int) -> Samples:
    "Made images and labels."
    g = torch.Generator().manual_seed(0)
    return Samples(torch.randint(256, (n, 3, 32, 32), generator=g, dtype=torch.uint8), torch.randint(CLASSES, (n,), generator=g), MEAN, STD, 32)


class OneByOne(Dataset):
    "Images as torchvision's CIFAR10 gives them: from an array, through PIL and the transforms."
    def __init__(self, samples: Samples):
        self.pixels, self.labels = samples.images.permute(0, 2, 3, 1).numpy(), samples.labels.tolist()
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])

    def __len__(self): return len(self.labels)

    def __getitem__(self, i): return self.transform(Image.fromarray(self.pixels[i])), self.labels[i]


def optimiser(model: nn.Module) -> torch.optim.Optimizer: return torch.optim.SGD(model.parameters(), .01, momentum=.9, weight_decay=1e-4)


def epochs(network: str, steps: int, batch: int, device: str) -> dict[str, Callable[[], object]]:
    "One epoch of each way, each with a model and an optimiser of its own."
    samples, settings = images(steps * batch), TrainSettings(batch_size=batch)
    fresh = lambda layout: build_model(network, CLASSES, 3, seed=0).to(device, memory_format=layout).train()
    last, plain = torch.channels_last, torch.contiguous_format

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches) -> None:
        for x, y in batches:
            loss = F.cross_entropy(model(x.to(device)), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def bare() -> Callable[[], object]:
        model = fresh(last)
        optimizer, prepared = optimiser(model), [(x.contiguous(memory_format=last), y) for x, y in samples.batches(batch, device)]
        return lambda: train(model, optimizer, prepared)

    def ours() -> Callable[[], object]:
        model = fresh(last)
        optimizer, batches = optimiser(model), samples.batches(batch, device)
        return lambda: train_epoch(model, batches, optimizer, settings, 0, steps, CLASSES, tqdm(disable=True))

    def first() -> Callable[[], object]:
        model = fresh(plain)
        optimizer, loader = optimiser(model), DataLoader(OneByOne(samples), batch, shuffle=True, num_workers=2)
        return lambda: train(model, optimizer, loader)

    return {BARE: bare(), OURS: ours(), FIRST: first()}


def readings(network: str, n: int, device: str) -> dict[str, dict[str, Callable[[], object]]]:
    "Passes over images in evaluation mode, each beside a bare forward pass of the same images."
    samples = images(n)
    model = build_model(network, CLASSES, 3, seed=0).to(device, memory_format=torch.channels_last).eval()
    test, train = samples.batches(500, device), samples.batches(128, device)
    forget, remain = (samples[index].batches(128, device) for index in (torch.arange(n // 10), torch.arange(n // 10, n)))

    def forward(*sets) -> Callable[[], object]:
        prepared = [x.contiguous(memory_format=torch.channels_last) for batches in sets for x, _ in batches]

        @torch.inference_mode()
        def step() -> None:
            for x in prepared: model(x)
        return step

    return {"evaluation": {"bare forward pass": forward(test), "accuracy": lambda: accuracy(model, test)},
            "activations": {"bare forward pass": forward(forget, remain), "activation_scores": lambda: activation_scores(model, forget, remain)},
            "tf-idf": {"bare forward pass": forward(train), "tfidf_scores": lambda: tfidf_scores(model, train, [0], batches=0)}}


def peak(network: str, way: str, steps: int, batch: int, device: str, threads: int) -> float:
    "MB that an epoch needs above what a fresh process has before anything of it is made."
    torch.set_num_threads(threads)
    epochs(network, 1, 2, device)[way]()  # libraries take what they keep
    return peak_of(lambda: epochs(network, steps, batch, device)[way]())


def main() -> None:
    parser = arguments(__doc__, ["resnet20"], 9)
    parser.add_argument("--steps", type=int, default=50, help="of an epoch")
    parser.add_argument("--images", type=int, default=10_000, help="to evaluate and to score")
    args = parser.parse_args()
    if args.peak: return print(peak(*json.loads(args.peak)))
    torch.set_num_threads(args.threads)
    for network in args.networks:
        rows = [{"what": "training", "images": args.steps * args.batch, **row} for row in ratios(in_turn(epochs(network, args.steps, args.batch, args.device), args.repeats, args.device), BARE)]
        for what, steps in readings(network, args.images, args.device).items():
            rows += [{"what": what, "images": args.images, **row} for row in ratios(in_turn(steps, args.repeats, args.device), next(iter(steps)))]
        if args.device == "cpu":
            for row in rows[:2]: row["peak_mb"] = round(peak_elsewhere(__file__, network, row["way"], args.steps, args.batch, args.device, args.threads))
        keep(pd.DataFrame(rows), args.out / f"training_{network}_{args.device}.csv", args.device, args.threads)


if __name__ == "__main__": main()
