"""What exact per-sample squares cost, as multiples of the plain forward and backward pass of the
same batch.

All ways take turns in one run, each in a process of its own that keeps the memory it frees, and
medians are compared; the peak memory of each is measured
in another process, above what that has before its first step. Prints a Markdown table and writes
one CSV a network. `make bench`, or `python benchmarks/fisher.py --help`.
"""

import argparse
import copy
import json
import statistics
import warnings
from collections.abc import Callable
from functools import partial

import pandas as pd
import torch
import torch.nn.functional as F
import torchvision
from timing import arguments, peak_elsewhere, peak_of, processes
from torch import nn
from torch.func import functional_call, grad, vmap

from fisher_unlearn.scores.fisher import _add
from fisher_unlearn.networks.models import build_model
from fisher_unlearn.networks.machine import provenance
from fisher_unlearn.scores.squares import GradientSquares, scoring
from fisher_unlearn.networks.machine import keep_freed_memory

CLASSES = 10
PLAIN, TRUE, EXPECTED = (
    "forward and backward",
    "diag_fisher, true labels",
    "diag_fisher, expected, a class",
)
RIVALS = ("BackPACK", "torch.func", "one sample at a time")
warnings.filterwarnings("ignore", category=UserWarning)


class Logits(nn.Module):
    "A network of transformers, which answers with its logits alone."

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).logits


def vit_tiny() -> nn.Module:
    "torchvision's, for images of 32×32; its head would start with zeros."
    sizes = {"num_layers": 12, "num_heads": 3, "hidden_dim": 192, "mlp_dim": 768}
    model = torchvision.models.VisionTransformer(32, 4, num_classes=CLASSES, **sizes)
    nn.init.normal_(model.heads.head.weight)
    return model


def bert_tiny() -> nn.Module:
    "Two layers of 128, which classify texts of 64 tokens."
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
    config = BertConfig(hidden_size=128, num_labels=CLASSES, **sizes)
    return Logits(BertForSequenceClassification(config))


def of_torchvision(name: str) -> nn.Module:
    "With random weights, and statistics that keep the signal alive."
    model = getattr(torchvision.models, name)(weights=None, num_classes=CLASSES)
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(8, 3, 64, 64))
    return model


FOREIGN = {"vit_tiny": vit_tiny, "bert_tiny": bert_tiny} | {
    name: partial(of_torchvision, name)
    for name in ("resnet18", "mobilenet_v3_small", "convnext_tiny", "swin_t")
}


def network_of(name: str) -> nn.Module:
    "One of the paper's networks, or of those that others use today."
    if name not in FOREIGN:
        return build_model(name, CLASSES, 3, seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FOREIGN[name]()


def inputs_of(name: str, batch: int, generator: torch.Generator) -> torch.Tensor:
    "Images of 32×32, or of 64×64 for torchvision's networks, which halve them more often; tokens."
    if name == "bert_tiny":
        return torch.randint(30_000, (batch, 64), generator=generator)
    size = 64 if name in FOREIGN and name != "vit_tiny" else 32
    images = torch.randn(batch, 3, size, size, generator=generator)
    return images.contiguous(memory_format=torch.channels_last)


def step_of(network: str, batch: int, device: str, way: str) -> Callable[[], object]:
    """One step of a way, on the same weights and images as the others, in evaluation mode and
    channels-last."""
    generator = torch.Generator().manual_seed(0)
    model = network_of(network).eval().to(device, memory_format=torch.channels_last)
    x = inputs_of(network, batch, generator).to(device)
    y = torch.randint(CLASSES, (batch,), generator=generator).to(device)
    squares, parameters = (
        GradientSquares(model),
        {n: p.detach() for n, p in model.named_parameters()},
    )

    def plain() -> None:
        F.cross_entropy(model(x), y).backward()
        model.zero_grad()

    def ours(labels: str) -> None:
        with scoring(model):
            _add(squares, x, y, labels, "sample", torch.Generator())

    def func() -> None:
        def loss(parameters, x, y):
            return F.cross_entropy(functional_call(model, parameters, (x[None],)), y[None])

        slopes = vmap(grad(loss), (None, 0, 0))
        total = {n: torch.zeros_like(p) for n, p in parameters.items()}
        for xs, ys in zip(x.split(16), y.split(16)):
            for n, g in slopes(parameters, xs, ys).items():
                total[n] += g.square().sum(0)

    def loop() -> None:
        total = [torch.zeros_like(p) for p in model.parameters()]
        for i in range(batch):
            slopes = torch.autograd.grad(
                F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters())
            )
            for t, g in zip(total, slopes):
                t.addcmul_(g, g)

    return {
        PLAIN: plain,
        TRUE: lambda: ours("true"),
        EXPECTED: lambda: ours("expected"),
        **dict(zip(RIVALS, (backpack_step(model, x, y), func, loop))),
    }[way]


def backpack_step(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], object]:
    "BackPACK's SumGradSquared, prepared at the first call."
    prepared: list = []

    def step() -> None:
        import backpack
        from backpack.extensions import SumGradSquared

        if not prepared:
            plain = copy.deepcopy(model)
            for m in plain.modules():
                if isinstance(m, nn.ReLU):
                    m.inplace = False
            prepared.extend(
                [
                    backpack.extend(plain, use_converter=True).eval(),
                    backpack.extend(nn.CrossEntropyLoss(reduction="sum")),
                ]
            )
        with backpack.backpack(SumGradSquared()):
            prepared[1](prepared[0](x), y).backward()
        prepared[0].zero_grad()

    return step


def peak(network: str, way: str, batch: int, device: str, threads: int) -> float:
    "MB that two steps need above what a fresh process has before them."
    torch.set_num_threads(threads)
    keep_freed_memory()
    step = step_of(network, batch, device, way)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(2):
            step()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    return peak_of(lambda: [step() for _ in range(2)])


def measure(network: str, args: argparse.Namespace) -> pd.DataFrame:
    "Rounds in which every way takes its turn; slow ones leave after as many as they are given."
    times: dict[str, list[float]] = {}
    with processes(
        step_of, (network, args.batch, args.device), [PLAIN, *args.ways], args.device, args.threads
    ) as clocks:
        for name, clock in clocks.items():
            try:
                clock()  # warm-up
            except RuntimeError as failed:
                print(f"{network}: {name} failed ({failed})")
            else:
                times[name] = []
        for k in range(args.repeats):
            for name, spent in times.items():
                if name in (PLAIN, TRUE) or k < args.slow_repeats:
                    spent.append(clocks[name]())
    return pd.DataFrame([row(network, name, times, args) for name in times])


def row(
    network: str, name: str, times: dict[str, list[float]], args: argparse.Namespace
) -> dict[str, object]:
    """Medians, the ratio to the plain step's median, the quartiles of the ratios within a round,
    and peak memory."""
    plain, factor = times[PLAIN], CLASSES if name == EXPECTED else 1
    ratios = sorted(t / p / factor for t, p in zip(times[name], plain))
    memory = peak_elsewhere(__file__, network, name, args.batch, args.device, args.threads)
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    about = provenance(args.device)
    return {
        "network": network,
        "way": name,
        "batch": args.batch,
        "repeats": len(ratios),
        "milliseconds": round(1e3 * statistics.median(times[name]) / factor, 1),
        "ratio": round(statistics.median(times[name]) / factor / statistics.median(plain), 3),
        "low": round(low, 3),
        "high": round(high, 3),
        "peak_mb": round(memory),
        "device": about["device"] if args.device == "cuda" else about["processor"],
        "threads": args.threads,
        "torch": about["torch"],
        "commit": about["commit"],
        "clean": about["clean"],
    }


def main() -> None:
    parser = arguments(__doc__, ["resnet20", "vgg16", "densenet", "googlenet"], 7)
    parser.add_argument(
        "--slow-repeats",
        type=int,
        default=7,
        help="rounds for all but the plain step and the true labels",
    )
    parser.add_argument(
        "--ways",
        nargs="+",
        default=[TRUE, EXPECTED, *RIVALS],
        choices=[TRUE, EXPECTED, *RIVALS],
        metavar="WAY",
    )
    args = parser.parse_args()
    if args.peak:
        return print(peak(*json.loads(args.peak)))
    args.out.mkdir(parents=True, exist_ok=True)
    for network in args.networks:
        table = measure(network, args)
        table.to_csv(args.out / f"fisher_{network}_{args.device}.csv", index=False)
        print(
            table.drop(columns=["device", "threads", "torch", "commit", "clean"]).to_markdown(
                index=False
            ),
            flush=True,
        )
    print(
        f"\n{table.device[0]}, {args.threads} threads, torch {table.torch[0]}. Ratio: "
        "to the forward and backward pass; low and high: quartiles over the rounds."
    )


if __name__ == "__main__":
    main()
