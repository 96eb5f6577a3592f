"""What exact per-sample squares cost, as multiples of the plain forward and backward pass of the
same batch.

All ways take turns in one run, each in a process of its own that keeps the memory it frees, and
medians are compared. A batch is one of many: what scoring does once for a network, such as
remembering its state and trying its rules out, is in the first step, which is not counted. Each way
with one label for each sample is first compared with the loop over single samples in double
precision, on four samples; one that fails there, leaves parameters out or is off is not timed
(expected labels are compared by the package's tests). The peak memory of each way is measured
in another process, over its first two steps, above what that process has once all is imported and a
loop is compiled. Prints a Markdown table and writes one CSV a network. `make bench`, or `python
benchmarks/fisher.py --help`.
"""

import argparse
import json
import math
import os
import statistics
import warnings
from collections.abc import Callable
from functools import partial

import pandas as pd
import torch
import torch.nn.functional as F
import torchvision
from timing import arguments, elsewhere, peak_elsewhere, peak_of, processes
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
WITHOUT = "diag_fisher, true labels, without llvmlite"
RIVALS = ("BackPACK", "nngeometry", "torch.func", "one sample at a time")
LAYOUTS = {"default": torch.contiguous_format, "channels_last": torch.channels_last}
EXACT = 0.01  # of a tensor's norm; squares in single precision are far nearer
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
    return torch.randn(batch, 3, size, size, generator=generator)


Squares = dict[str, torch.Tensor]  # by the name of the parameter
Step = Callable[[], Squares]


def plain_step(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Step:
    "What everything is compared with: the gradient of a batch."

    def step() -> Squares:
        F.cross_entropy(model(x), y).backward()
        model.zero_grad()
        return {}

    return step


def our_step(model: nn.Module, x: torch.Tensor, y: torch.Tensor, labels: str) -> Step:
    "A batch of `diag_fisher`; the sums go on."
    with scoring(model) as before:
        squares = GradientSquares(model, before)

    def step() -> Squares:
        with torch.no_grad():
            _add(squares, x, y, labels, "sample", torch.Generator())
        return squares.total

    return step


def step_without_loops(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Step:
    "Ours where the loops that llvmlite compiles aren't installed."
    os.environ["FISHER_UNLEARN_FUSED"] = "0"
    return our_step(model, x, y, "true")


def keep_inputs(model: nn.Module) -> None:
    "Who watches layers can't have them write over their inputs."
    for m in model.modules():
        if hasattr(m, "inplace"):
            m.inplace = False


def backpack_step(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Step:
    "BackPACK's SumGradSquared."
    import backpack
    from backpack.extensions import SumGradSquared

    keep_inputs(model)
    extended = backpack.extend(model, use_converter=True).eval()
    loss = backpack.extend(nn.CrossEntropyLoss(reduction="sum"))
    names = {id(p): name for name, p in model.named_parameters()}

    def step() -> Squares:
        with backpack.backpack(SumGradSquared()):
            loss(extended(x), y).backward()
        extended.zero_grad()
        return {names[id(p)]: p.sum_grad_squared for p in extended.parameters()}

    return step


def nngeometry_step(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Step:
    "The diagonal that nngeometry makes of the log-probabilities of the labels."
    from nngeometry.backend import TorchHooksJacobianBackend
    from nngeometry.layercollection import LayerCollection
    from nngeometry.object import PMatDiag
    from torch.utils.data import DataLoader, TensorDataset

    keep_inputs(model)
    layers = LayerCollection.from_model(model)
    made = layers.get_layerid_module_maps(model)[0]
    names = {id(p): name for name, p in model.named_parameters()}
    batch = DataLoader(TensorDataset(x, y), batch_size=len(x))

    def chosen(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.log_softmax(model(x), 1).gather(1, y[:, None])

    def step() -> Squares:
        backend = TorchHooksJacobianBackend(model, chosen, layer_collection=layers)
        entries, found = PMatDiag(generator=backend, examples=batch).get_diag() * len(x), {}
        for key, start in layers.p_pos.items():
            for p in filter(lambda p: p is not None, (made[key].weight, made[key].bias)):
                found[names[id(p)]] = entries[start : start + p.numel()].view_as(p)
                start += p.numel()
        return found

    return step


def func_step(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Step:
    "torch.func's gradients of sixteen samples at a time."
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def loss(parameters, x, y):
        return F.cross_entropy(functional_call(model, parameters, (x[None],)), y[None])

    slopes = vmap(grad(loss), (None, 0, 0))

    def step() -> Squares:
        total = {n: torch.zeros_like(p) for n, p in parameters.items()}
        for xs, ys in zip(x.split(16), y.split(16)):
            for n, g in slopes(parameters, xs, ys).items():
                total[n] += g.square().sum(0)
        return total

    return step


def loop_step(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Step:
    "One sample at a time."
    names, parameters = zip(*model.named_parameters())

    def step() -> Squares:
        total = [torch.zeros_like(p) for p in parameters]
        for xi, yi in zip(x.split(1), y.split(1)):
            slopes = torch.autograd.grad(F.cross_entropy(model(xi), yi), parameters)
            for t, g in zip(total, slopes):
                t.addcmul_(g, g)
        return dict(zip(names, total))

    return step


STEPS: dict[str, Callable[[nn.Module, torch.Tensor, torch.Tensor], Step]] = {
    PLAIN: plain_step,
    TRUE: partial(our_step, labels="true"),
    EXPECTED: partial(our_step, labels="expected"),
    WITHOUT: step_without_loops,
    **dict(zip(RIVALS, (backpack_step, nngeometry_step, func_step, loop_step))),
}


def drawn(
    network: str, batch: int, device: str, layout: str
) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    "A network in evaluation mode, inputs and labels, the same for all ways."
    generator = torch.Generator().manual_seed(0)
    model = network_of(network).eval().to(device, memory_format=LAYOUTS[layout])
    x = inputs_of(network, batch, generator).to(device)
    y = torch.randint(CLASSES, (batch,), generator=generator).to(device)
    return model, x.contiguous(memory_format=LAYOUTS[layout]) if x.dim() == 4 else x, y


def step_of(network: str, batch: int, device: str, layout: str, way: str) -> Step:
    "One step of a way."
    return STEPS[way](*drawn(network, batch, device, layout))


def trial(network: str, way: str, device: str) -> dict[str, object]:
    """How far a way is from the loop in double precision: the largest distance of a parameter's
    squares, relative to their norm, and the number of parameters that it leaves out."""
    if way in (PLAIN, EXPECTED):
        return {"error": None, "left_out": None, "failed": None}
    model, x, y = drawn(network, 4, device, "default")
    wanted = loop_step(model.double(), x.double() if x.is_floating_point() else x, y)()
    try:
        found = step_of(network, 4, device, "default", way)()
    except Exception as error:  # noqa: BLE001
        # whatever a rival says to a network that it can't follow
        return {
            "error": None,
            "left_out": None,
            "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:100]}",
        }
    norms = {n: float(w.norm()) for n, w in wanted.items()}
    least = 1e-6 * max(norms.values())  # some gradients are nothing but rounding
    off = {n: (found[n] - wanted[n]).norm() for n in wanted.keys() & found.keys()}
    errors = [float(distance) / (norms[n] + least) for n, distance in off.items()]
    error = max(math.inf if math.isnan(e) else e for e in errors)
    return {"error": error, "left_out": len(wanted) - len(off), "failed": None}


def is_exact(tried: dict) -> bool:
    "Did a way give all squares in its trial, if it was tried?"
    return tried["failed"] is None and not tried["left_out"] and (tried["error"] or 0) <= EXACT


def peak(network: str, way: str, batch: int, device: str, layout: str, threads: int) -> float:
    "MB that two steps need above what a fresh process has before them."
    torch.set_num_threads(threads)
    keep_freed_memory()
    our_step(nn.Linear(8, 8), torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64), "true")()
    given = drawn(network, batch, device, layout)

    def two_steps() -> None:
        step = STEPS[way](*given)
        step(), step()

    if device != "cuda":
        return peak_of(two_steps)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    two_steps()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def measure(network: str, layout: str, ways: list[str], args: argparse.Namespace) -> pd.DataFrame:
    "Rounds in which every way takes its turn; slow ones leave after as many as they are given."
    tried = {way: elsewhere(trial, network, way, args.device) for way in (PLAIN, *ways)}
    exact = [way for way, found in tried.items() if is_exact(found)]
    times: dict[str, list[float]] = {way: [] for way in exact}
    asked = (network, args.batch, args.device, layout)
    with processes(step_of, asked, exact, args.device, args.threads) as clocks:
        for way, clock in clocks.items():
            try:
                clock()  # warm-up
            except RuntimeError as failed:
                tried[way]["failed"] = str(failed)
                del times[way]
        for k in range(args.repeats):
            for way, spent in times.items():
                if way in (PLAIN, TRUE) or k < args.slow_repeats:
                    spent.append(clocks[way]())
    about = provenance(args.device)
    conditions = {
        "device": about["device"] if args.device == "cuda" else about["processor"],
        "threads": args.threads,
        **{name: about[name] for name in ("torch", "commit", "clean")},
    }
    return pd.DataFrame(
        [
            {"network": network, "layout": layout, "way": way, "batch": args.batch}
            | found
            | (cost(way, layout, network, times, args) if way in times else {})
            | conditions
            for way, found in tried.items()
        ]
    )


def cost(
    way: str, layout: str, network: str, times: dict[str, list[float]], args: argparse.Namespace
) -> dict[str, object]:
    """Medians, the ratio to the plain step's median, the quartiles of the ratios within a round,
    and peak memory."""
    plain, factor = times[PLAIN], CLASSES if way == EXPECTED else 1
    ratios = sorted(t / p / factor for t, p in zip(times[way], plain))
    memory = peak_elsewhere(__file__, network, way, args.batch, args.device, layout, args.threads)
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return {
        "repeats": len(ratios),
        "milliseconds": round(1e3 * statistics.median(times[way]) / factor, 1),
        "ratio": round(statistics.median(times[way]) / factor / statistics.median(plain), 3),
        "low": round(low, 3),
        "high": round(high, 3),
        "peak_mb": round(memory),
    }


def layouts_of(network: str) -> list[tuple[str, list[str]]]:
    "Layouts, and what is measured in each: rivals in one, and tokens have none."
    ours = [TRUE, EXPECTED]
    if network == "bert_tiny":
        return [("default", [*ours, WITHOUT, *RIVALS])]
    return [("default", ours), ("channels_last", [*ours, WITHOUT, *RIVALS])]


def main() -> None:
    parser = arguments(__doc__, ["resnet20", "vgg16", "densenet", "googlenet", *FOREIGN], 7)
    parser.add_argument(
        "--slow-repeats",
        type=int,
        default=3,
        help="rounds for all but the plain step and the true labels",
    )
    args = parser.parse_args()
    if args.peak:
        return print(peak(*json.loads(args.peak)))
    args.out.mkdir(parents=True, exist_ok=True)
    for network in args.networks:
        tables = [measure(network, layout, ways, args) for layout, ways in layouts_of(network)]
        table = pd.concat(tables)
        table.to_csv(args.out / f"fisher_{network}_{args.device}.csv", index=False)
        shown = table.drop(columns=["device", "threads", "torch", "commit", "clean"])
        print(shown.to_markdown(index=False), flush=True)
    print(
        f"\n{table.device.iloc[0]}, {args.threads} threads, torch {table.torch.iloc[0]}. Ratio: "
        "to the forward and backward pass; low and high: quartiles over the rounds."
    )


if __name__ == "__main__":
    main()
