"What the benchmarks share: a clock, the memory of this process, and tables."
import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

from fisher_unlearn.records import provenance

ABOUT = ["device", "threads", "torch", "python", "commit", "clean"]


def arguments(about: str, networks: list[str], repeats: int) -> argparse.ArgumentParser:
    "The options of a benchmark of networks."
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=networks)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("figures/benchmarks"))
    parser.add_argument("--peak", help=argparse.SUPPRESS)  # what `peak_elsewhere` asks
    return parser


def seconds(step: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    step()
    if device == "cuda": torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(steps: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, list[float]]:
    "Seconds of each step in rounds in which every one takes its turn, after one round that isn't counted."
    times: dict[str, list[float]] = {name: [] for name in steps}
    for k in range(repeats + 1):
        for name, step in steps.items():
            spent = seconds(step, device)
            if k: times[name].append(spent)
    return times


def ratios(times: dict[str, list[float]], to: str) -> list[dict[str, object]]:
    "A row for each step: its median, the ratio to the median of another one, and the quartiles of the ratios within a round."
    rows: list[dict[str, object]] = []
    for name, spent in times.items():
        within = sorted(a / b for a, b in zip(spent, times[to]))
        low, _, high = statistics.quantiles(within, n=4) if len(within) > 1 else [within[0]] * 3
        median = statistics.median(spent)
        rows.append({"way": name, "repeats": len(spent), "milliseconds": round(1e3 * median, 1), "ratio": round(median / statistics.median(times[to]), 3), "low": round(low, 3), "high": round(high, 3)})
    return rows


def resident(what: str) -> int:
    "kB of this process's memory: VmRSS now, or VmHWM at its peak (Linux)."
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what)).split()[1])


def peak_of(step: Callable[[], object]) -> float:
    "MB that a step needs above what this process holds before it."
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = resident("VmHWM")
    step()
    return (resident("VmHWM") - before) / 1e3


def peak_elsewhere(script: str, *asked: object) -> float:
    "What the script prints last if it is asked for a peak, in a process of its own."
    command = [sys.executable, script, "--peak", json.dumps(asked)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def keep(table: pd.DataFrame, path: Path, device: str, threads: int) -> None:
    "Print a table with the conditions of its numbers, and write it as CSV with them."
    about = provenance(device) | {"threads": threads}
    about["device"] = about["device"] if device == "cuda" else f"{about['processor']}, {about['cores']} cores"
    path.parent.mkdir(parents=True, exist_ok=True)
    table.assign(**{name: about[name] for name in ABOUT}).to_csv(path, index=False)
    print(table.to_markdown(index=False), f"\n{about['device']}, {threads} threads, torch {about['torch']}, Python {about['python']}, commit {about['commit'][:7]}{'' if about['clean'] else ' with changes'}.\n", sep="\n", flush=True)
