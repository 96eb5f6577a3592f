"""What bfloat16 does to accuracy: the same network trained with the same seeds, in float32 and
in bfloat16, to its last epoch.

Prints a Markdown table with a row for each seed and writes it as CSV. Runs that are done in
`--runs` aren't done again. `make bench WHAT=precision`, or
`python benchmarks/precision.py --help`."""

import argparse
from pathlib import Path

import pandas as pd
from timing import keep

from fisher_unlearn.lab.settings import resolve
from fisher_unlearn.lab.run import images_of, train_original


def trained(seed: int, precision: str, args: argparse.Namespace) -> dict[str, float]:
    "Test accuracy in percent and training loss of a run's last epoch."
    settings = resolve(
        "cpu",
        dataset=args.dataset,
        network=args.network,
        subset=args.subset,
        epochs=args.epochs,
        seed=seed,
        precision=precision,
        select="last",
        device=args.device,
    )
    _, record = train_original(settings, images_of(settings), args.runs)
    history = pd.DataFrame(record["history"])
    return {
        precision: history.accuracy.iloc[-1],
        f"{precision}, loss": round(history.train_loss.iloc[-1], 4),
    }


def compared(seed: int, args: argparse.Namespace) -> dict[str, object]:
    "A row: one seed in both precisions."
    what = {
        "dataset": args.dataset,
        "network": args.network,
        "images": args.subset or "all",
        "epochs": args.epochs,
        "seed": seed,
    }
    return what | trained(seed, "float32", args) | trained(seed, "bfloat16", args)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--subset", type=int, help="training images; default: all")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=Path("figures/benchmarks"))
    args = parser.parse_args()
    rows = [compared(seed, args) for seed in args.seeds]
    keep(
        pd.DataFrame(rows),
        args.out / f"precision_{args.dataset}_{args.network}_{args.device}.csv",
        args.device,
        2,
    )


if __name__ == "__main__":
    main()
