"""What the squares of a convolution's weight cost, beside the forward pass of the same
convolution: by the loop in registers, and by unrolled windows and products of matrices.

The three take turns on one part of a batch, for each shape of convolution in a network. Prints a
Markdown table and writes one CSV a network.
`make bench WHAT=convolutions`, or `python benchmarks/convolutions.py --help`.
"""

import argparse
from collections.abc import Callable
from functools import partial

import pandas as pd
import torch
from timing import arguments, in_turn, keep, seconds
from torch import nn

from fisher_unlearn.networks.models import build_model
from fisher_unlearn.scores.squares import _in_registers, _Taps, _unrolled
from fisher_unlearn.networks.machine import keep_freed_memory


def shapes(network: str) -> dict[tuple, tuple[nn.Conv2d, torch.Size]]:
    "One convolution of each shape that a network has, and the shape of its input."
    found: dict[tuple, tuple[nn.Conv2d, torch.Size]] = {}

    def look(conv, args, out) -> None:
        found.setdefault(
            (conv.weight.shape, conv.stride, args[0].shape[1:]), (conv, args[0].shape[1:])
        )

    model = build_model(network, 10, 3, seed=0).eval()
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            m.register_forward_hook(look)
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    return found


def measure(conv: nn.Conv2d, size: torch.Size, args: argparse.Namespace) -> dict[str, object]:
    "Milliseconds of the forward pass and of both ways to the squares."
    last = {"memory_format": torch.channels_last}
    with torch.no_grad():
        x = torch.randn(args.batch, *size).to(**last)
        g = torch.randn_like(conv.to(**last)(x)).to(**last)
        taps, weight = _Taps.of(conv), conv.weight.detach()
        ways: dict[str, Callable[[], object]] = {
            "forward": lambda: conv(x),
            "fused": lambda: _in_registers(taps, weight, x, [g]),
            "unrolled": lambda: _unrolled(taps, weight, x, [g]),
        }
        times = (
            pd.DataFrame(
                in_turn(
                    {name: partial(seconds, way, "cpu") for name, way in ways.items()}, args.repeats
                )
            ).median()
            * 1e3
        )
    return {
        "weight": "×".join(map(str, weight.shape)),
        "stride": conv.stride[0],
        "image": "×".join(map(str, size[1:])),
        "batch": args.batch,
        **times.round(3),
    }


def main() -> None:
    parser = arguments(__doc__, ["resnet20", "vgg16", "densenet", "googlenet"], 7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    for network in args.networks:
        table = pd.DataFrame([measure(conv, size, args) for conv, size in shapes(network).values()])
        keep(table, args.out / f"convolutions_{network}_cpu.csv", "cpu", args.threads)


if __name__ == "__main__":
    main()
