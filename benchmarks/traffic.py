"""How fast this machine moves what scoring moves: GB/s of single gradients that are written, and that are squared and added up, in blocks that a CPU's cache holds;
and of images that are copied into another layout. Prints a Markdown table and writes a CSV. `make bench WHAT=traffic`, or `python benchmarks/traffic.py --help`."""
import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from timing import in_turn, keep, seconds

from fisher_unlearn.train import keep_freed_memory

ROWS, COLUMNS = 200, 1536  # of the gradients of VGG16's widest layers, what the engine treats at once


def ways() -> dict[str, tuple[float, Callable[[], object]]]:
    "The GB that each way moves, and how."
    gradients, total = torch.empty(6, ROWS, COLUMNS), torch.zeros(2, ROWS, COLUMNS)
    images = torch.randn(64, 64, 32, 32).contiguous(memory_format=torch.channels_last)

    def square_and_add() -> None:
        for ones in gradients.unflatten(0, (len(total), -1)).unbind(1): total.addcmul_(ones, ones)

    return {"write": (gradients.nbytes / 1e9, lambda: gradients.fill_(1e-3)), "square and add": (gradients.nbytes / 1e9, square_and_add), "copy": (2 * images.nbytes / 1e9, images.contiguous)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=201)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("figures/benchmarks"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    moved = ways()
    times = in_turn({name: partial(seconds, step, "cpu") for name, (_, step) in moved.items()}, args.repeats)
    table = pd.DataFrame([{"what": name, "repeats": args.repeats, "GB/s": round(gb / statistics.median(times[name]), 2)} for name, (gb, _) in moved.items()])
    keep(table, args.out / "traffic_cpu.csv", "cpu", args.threads)


if __name__ == "__main__": main()
