"""What a run costs beside its work: seconds from `complete` to its record, less those that the
record counts as method, fine-tuning and evaluation.

Executors take turns in one run; prints a Markdown table, in seconds, and writes a CSV. `make
bench`, or `python benchmarks/overhead.py --help`."""

import argparse
import contextlib
import io
import tempfile
import time
from pathlib import Path

import pandas as pd
from timing import keep

from fisher_unlearn.lab.executors import EXECUTORS, complete
from fisher_unlearn.lab.experiments import sweep


def overhead(on: str, number: int, folder: str) -> float:
    "Seconds beside the work of one small run, another one for each number, whose w* is trained."
    settings = sweep(
        "quick",
        method="random_mask",
        epochs=1,
        fine_tune_epochs=1,
        device="cpu",
        ratio=0.001 * (number + 1),
    )
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        (record,) = complete(settings, folder, on=on)
    return time.perf_counter() - start - sum(record["seconds"].values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--executors", nargs="+", default=["inline", "papermill"], choices=EXECUTORS
    )
    parser.add_argument("--out", type=Path, default=Path("figures/benchmarks"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        overhead("inline", 0, folder)  # trains w*, and imports what is imported at first use
        rows = [
            (on, overhead(on, 1 + k * len(args.executors) + i, folder))
            for k in range(args.repeats)
            for i, on in enumerate(args.executors)
        ]
    table = (
        pd.DataFrame(rows, columns=["executor", "seconds"])
        .groupby("executor", sort=False)
        .seconds.agg(repeats="count", median="median", min="min", max="max")
    )
    keep(table.round(3).reset_index(), args.out / "overhead_cpu.csv", "cpu", 2)


if __name__ == "__main__":
    main()
