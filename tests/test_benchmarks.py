"""What the benchmark compares is the same thing, and a way that is something else isn't timed."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import fisher  # the benchmark, not the chapter
import loaders

from fisher_unlearn.images.data import load_images

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("way", [fisher.TRUE, *fisher.RIVALS, fisher.WITHOUT])
def test_every_way_gives_the_squares_of_the_loop(way, monkeypatch):
    monkeypatch.setenv("FISHER_UNLEARN_FUSED", "")  # which one of them sets
    found = fisher.trial("resnet20", way, "cpu")
    assert fisher.is_exact(found) and found["error"] < 1e-4


@pytest.mark.parametrize(
    "spoil",
    [
        lambda squares: {n: 1.1 * s for n, s in squares.items()},
        lambda squares: dict([*squares.items()][1:]),
        lambda squares: squares["nothing"],
        lambda squares: squares | {[*squares][-1]: torch.tensor(torch.nan)},
    ],
)
def test_a_way_that_is_something_else_is_not_timed(monkeypatch, spoil):
    def other(model, x, y):
        return lambda: spoil(fisher.loop_step(model, x, y)())

    monkeypatch.setitem(fisher.STEPS, "torch.func", other)
    assert not fisher.is_exact(fisher.trial("resnet20", "torch.func", "cpu"))


@pytest.mark.parametrize("layout", fisher.LAYOUTS)
def test_a_layout_is_that_of_weights_and_images(layout):
    model, x, _ = fisher.drawn("resnet20", 4, "cpu", layout)
    kind = fisher.LAYOUTS[layout]
    kernels = [p for p in model.parameters() if p.dim() == 4 and p.shape[2] > 1]
    assert all(t.is_contiguous(memory_format=kind) for t in (x, *kernels))
    assert torch.equal(x, fisher.drawn("resnet20", 4, "cpu", "default")[1])


def test_a_data_set_is_trained_on_and_scored():
    row = loaders.tried(load_images("digits").subset(128, seed=0), "resnet20", 4, "cpu")
    assert (row["images"], row["images scored"]) == (128, 8)
    assert row["entries masked"] > 0 and 0 < row["loss"] < 10 and 0 <= row["test accuracy"] <= 100
