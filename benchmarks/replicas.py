"""How fast are steps of ResNet-20 when several processes share a GPU, as processes that work on
one folder of runs do?

All processes take each way of a step at the same time, on made batches of CIFAR's shape, with
the deterministic kernels of our runs. The time of a step of one process, divided by their
number, is what the
GPU gives. NVIDIA's MPS lets kernels of several processes run side by side: start its daemon
(`nvidia-cuda-mps-control -d`) before this script, and the table says so. Prints a Markdown table
and adds to a CSV file.
`python benchmarks/replicas.py --help`."""

import argparse
import os
import statistics
import time
from pathlib import Path

import pandas as pd
import torch
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from timing import keep

from fisher_unlearn.networks.models import build_model
from fisher_unlearn.networks.machine import repeatable
from fisher_unlearn.networks.step import Way, forward_in

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
WAYS = {
    "float32": ("channels_last", Way()),
    "float32, graph": ("channels_last", Way(graphed=True)),
    "float32, graph, contiguous": ("contiguous", Way(graphed=True)),
    "tf32, graph": ("channels_last", Way(graphed=True)),
    "bfloat16, graph": ("channels_last", Way(precision="bfloat16", graphed=True)),
}


def steps(network: str, layout: str, way: Way, batch: int, device: str):
    "A step on one of ten made batches, as a function of its number."
    place = {"device": device, "memory_format": LAYOUTS[layout]}
    model = build_model(network, 10, 3, seed=0).to(**place).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    inputs, labels = (
        [torch.randn(batch, 3, 32, 32).to(**place) for _ in range(10)],
        torch.randint(10, (10, batch), device=device),
    )
    forward = forward_in(model, way)

    def step(k: int) -> None:
        loss = F.cross_entropy(forward(inputs[k % 10]), labels[k % 10])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def measure(
    ways: list[str], network: str, batch: int, device: str, threads: int, n: int, barrier, answers
) -> None:
    "Milliseconds of a step of this process in each way, while the other processes do the same."
    finished, times = torch.cuda.synchronize if device == "cuda" else lambda: None, {}
    for name in ways:
        with repeatable(threads):
            torch.backends.cudnn.allow_tf32 = name.startswith("tf32")  # put back with the rest
            step = steps(network, *WAYS[name], batch, device)
            for k in range(10):
                step(k)
            finished()
            barrier.wait()
            start = time.perf_counter()
            for k in range(n):
                step(k)
            finished()
            times[name] = 1e3 * (time.perf_counter() - start) / n
            barrier.wait()
    answers.put(times)


def together(processes: int, ways: list[str], args: argparse.Namespace) -> list[dict[str, object]]:
    "A row for each way, with so many processes."
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(processes), context.Queue()
    running = [
        context.Process(
            target=measure,
            args=(
                ways,
                args.network,
                args.batch,
                args.device,
                args.threads,
                args.steps,
                barrier,
                answers,
            ),
            daemon=True,
        )
        for _ in range(processes)
    ]
    for process in running:
        process.start()
    found = [answers.get(timeout=args.patience) for _ in running]
    for process in running:
        process.join()
    rows = []
    for name in ways:
        one = statistics.mean(times[name] for times in found)
        rows.append(
            {
                "processes": processes,
                "mps": "CUDA_MPS_PIPE_DIRECTORY" in os.environ,
                "way": name,
                "milliseconds": round(one, 3),
                "of the GPU": round(one / processes, 3),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 6])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--patience",
        type=int,
        default=600,
        help="seconds that all ways of one number of processes may take",
    )
    parser.add_argument("--out", type=Path, default=Path("figures/benchmarks"))
    args = parser.parse_args()
    ways = [
        name
        for name, (_, way) in WAYS.items()
        if args.device == "cuda" or not (way.graphed or name.startswith("tf32"))
    ]
    rows = [row for processes in args.processes for row in together(processes, ways, args)]
    path = args.out / f"replicas_{args.network}_{args.device}.csv"
    before = pd.read_csv(path) if path.exists() else None
    keep(pd.DataFrame(rows), path, args.device, args.threads)
    if before is not None:
        pd.concat([before, pd.read_csv(path)]).to_csv(path, index=False)


if __name__ == "__main__":
    main()
