"What the benchmarks share: a clock, the memory of this process, and tables."

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

import pandas as pd
import torch

from fisher_unlearn.networks.machine import provenance
from fisher_unlearn.networks.machine import keep_freed_memory

T = TypeVar("T")
ABOUT = ["device", "threads", "torch", "python", "commit", "clean"]


def arguments(about: str, networks: list[str], repeats: int) -> argparse.ArgumentParser:
    "The options of a benchmark of networks."
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@contextmanager
def processes(
    build: Callable[..., Callable[[], object]],
    asked: tuple,
    ways: Sequence[str],
    device: str,
    threads: int,
    as_they_are: Sequence[str] = (),
) -> Iterator[dict[str, Callable[[], float]]]:
    """A clock for each way: it runs the step `build(*asked, way)` once, in a process of that
    way's own, and returns its seconds.

    So no way uses memory that another one left, and all keep what they free as our runs do,
    except those that shall be `as_they_are`. What a step
    raises, its clock raises as a `RuntimeError`."""
    context, running = multiprocessing.get_context("spawn"), {}
    try:
        for way in ways:
            here, there = context.Pipe()
            process = context.Process(
                target=_answer,
                args=(there, build, (*asked, way), device, threads, way not in as_they_are),
            )
            process.start()
            running[way] = process, here
        yield {way: partial(_ask, here) for way, (_, here) in running.items()}
    finally:
        for process, here in running.values():
            here.close()
            process.join()


def _answer(
    pipe: Connection,
    build: Callable[..., Callable[[], object]],
    asked: tuple,
    device: str,
    threads: int,
    kept: bool,
) -> None:
    "The process of one way: a time, or a sentence, for each question."
    multiprocessing.set_start_method(
        None,
        force=True,
        # else the workers of a DataLoader would be spawned too, which is slower than what they are
        # by
        # default
    )
    torch.set_num_threads(threads)
    if kept:
        keep_freed_memory()
    step = None
    with suppress(EOFError):  # nobody asks any more
        while pipe.recv():
            try:
                step = step or build(*asked)
                pipe.send(seconds(step, device))
            except Exception as error:  # noqa: BLE001
                pipe.send(f"{type(error).__name__}: {' '.join(str(error).split())[:80]}")


def _ask(pipe: Connection) -> float:
    try:
        pipe.send(True)
        said = pipe.recv()
    except (BrokenPipeError, EOFError) as ended:
        raise RuntimeError("its process was ended, for its memory most likely") from ended
    if isinstance(said, str):
        raise RuntimeError(said)
    return said


def in_turn(clocks: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each way in rounds in which every one takes its turn, after one round that
    isn't counted."""
    times: dict[str, list[float]] = {name: [] for name in clocks}
    for k in range(repeats + 1):
        for name, clock in clocks.items():
            spent = clock()
            if k:
                times[name].append(spent)
    return times


def ratios(times: dict[str, list[float]], to: str) -> list[dict[str, object]]:
    """A row for each step: its median, the ratio to the median of another one, and the quartiles
    of the ratios within a round."""
    rows: list[dict[str, object]] = []
    for name, spent in times.items():
        within = sorted(a / b for a, b in zip(spent, times[to]))
        low, _, high = statistics.quantiles(within, n=4) if len(within) > 1 else [within[0]] * 3
        median = statistics.median(spent)
        rows.append(
            {
                "way": name,
                "repeats": len(spent),
                "milliseconds": round(1e3 * median, 1),
                "ratio": round(median / statistics.median(times[to]), 3),
                "low": round(low, 3),
                "high": round(high, 3),
            }
        )
    return rows


def resident(what: str) -> int:
    "kB of this process's memory: VmRSS now, or VmHWM at its peak (Linux)."
    return int(
        next(
            line
            for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
            if line.startswith(what)
        ).split()[1]
    )


def peak_of(step: Callable[[], object]) -> float:
    "MB that a step needs above what this process holds before it."
    Path("/proc/self/clear_refs").write_text(
        "5", encoding="utf-8"
    )  # the high-water mark starts again from here
    before = resident("VmHWM")
    step()
    return (resident("VmHWM") - before) / 1e3


def elsewhere(function: Callable[..., T], *asked: object) -> T:
    "What a function answers in a process of its own, which nothing before it can have changed."
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *asked).result()


def peak_elsewhere(script: str, *asked: object) -> float:
    "What the script prints last if it is asked for a peak, in a process of its own."
    command = [sys.executable, script, "--peak", json.dumps(asked)]
    return float(
        subprocess.run(
            command, capture_output=True, text=True, check=True, encoding="utf-8"
        ).stdout.split()[-1]
    )


def keep(table: pd.DataFrame, path: Path, device: str, threads: int) -> None:
    "Print a table with the conditions of its numbers, and write it as CSV with them."
    about = provenance(device) | {"threads": threads}
    about["device"] = (
        about["device"]
        if device == "cuda"
        else f"{about['processor']} with {about['instructions']}, {about['cores']} cores"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    table.assign(**{name: about[name] for name in ABOUT}).to_csv(path, index=False)
    print(
        table.to_markdown(index=False),
        f"\n{about['device']}, {threads} threads, torch {about['torch']}, Python "
        f"{about['python']}, commit "
        f"{about['commit'][:7]}{'' if about['clean'] else ' with changes'}.\n",
        sep="\n",
        flush=True,
    )
