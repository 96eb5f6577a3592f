"""Whoever calls the package finds their process as it was: threads, environment, torch's flags,
generators, warnings, signals, the working folder."""

import ast
import os
import random
import signal
import warnings
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fisher_unlearn
from fisher_unlearn import (
    METHODS,
    Schedule,
    TrainSettings,
    agreement,
    candidates,
    diag_fisher,
    evaluate,
    forget_class,
    load_images,
    relearn_time,
    select_top,
    train_model,
    unlearn,
    zero_,
)

PACKAGE = Path(fisher_unlearn.__file__).parent
TUNE = TrainSettings(Schedule(epochs=1, drops=()), select="last")
# what belongs to the process of the runner and of the command
RUNNERS = {"cli.py", "start.py", "terminal.py", "machine.py", "notebook.py", "cluster.py"}


def state():
    "What of a process a caller may rely on."
    flags = [torch.backends.cudnn, torch.backends.cuda.matmul, torch.backends.mkldnn]
    return {
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "flags": [
            (name, getattr(place, name, None))
            for place in flags
            for name in ("enabled", "benchmark", "deterministic", "allow_tf32")
        ],
        "warnings": list(warnings.filters),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
        "drawn": (torch.get_rng_state().tolist(), random.getstate()),
        "numpy": np.random.get_state()[1].tolist(),
    }


def network(seed):
    "A small network that every method takes."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        body = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
        return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


@pytest.fixture(scope="module")
def few():
    "A few digits, a network, and requests as loaders."
    images = load_images("digits").subset(96, 0)
    request = forget_class(images, 0)
    return request, network(0)


def calls(request, model):
    "The public jobs, by name."
    forget, remain = request.forget.batches(16), request.remain.batches(16)
    build, unseen = lambda: network(1), load_images("digits").test.batches(64)
    pool = candidates(model)
    scores = diag_fisher(model, forget)
    yield "diag_fisher", lambda: diag_fisher(model, remain, "expected", "batch")
    yield "train_model", lambda: train_model(build(), remain, TUNE, progress="none")
    yield "evaluate", lambda: evaluate(model, {"forget": forget})
    yield "zero_", lambda: zero_(build(), select_top(scores, 0.02, pool))
    yield "agreement", lambda: agreement(model, build(), remain)
    relearn = TrainSettings(Schedule(epochs=2, drops=()))
    yield (
        "relearn_time",
        lambda: relearn_time(
            build(), model, remain, forget, relearn, "classifier", 1, progress="none"
        ),
    )
    for name in METHODS:
        own = {f.name for f in fields(METHODS[name])}
        fewer = {n: 1 for n in ("lissa_epochs", "own_epochs", "sfron_steps") if n in own}
        yield (
            name,
            lambda name=name, fewer=fewer: unlearn(
                model,
                forget,
                remain,
                method=name,
                fine_tune=TUNE,
                reference=[*forget, *remain],
                build=build,
                held_out=unseen,
                progress="none",
                **fewer,
            ),
        )


def test_public_jobs_leave_the_process_as_it_was(few):
    for name, call in calls(*few):
        before = state()
        call()
        after = state()
        changed = [what for what in before if before[what] != after[what]]
        assert not changed, f"{name} changes {changed}"


def changes(source):
    "Lines of code that change a process."
    setters = {"set_num_threads", "set_num_interop_threads", "set_default_dtype", "simplefilter"}
    setters |= {"use_deterministic_algorithms", "set_default_device", "mallopt", "chdir"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", None) in setters:
            yield node.lineno
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if ast.unparse(target).startswith(("os.environ", "torch.backends", "warnings.")):
                    yield node.lineno


def test_only_the_runner_changes_its_process():
    "And the check sees what it looks for."
    planted = "import os, torch\nos.environ['A'] = '1'\ntorch.set_num_threads(1)\n"
    assert [*changes(planted)] == [2, 3]
    found = {
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in PACKAGE.rglob("*.py")
        if path.name not in RUNNERS
        for line in changes(path.read_text(encoding="utf-8"))
    }
    assert not found
