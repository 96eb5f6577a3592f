"""The estimators against plain loops written from the formulas: nothing is shared with the
package."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import rank
from fisher_unlearn.scores import fisher
from fisher_unlearn.scores.fisher import diag_fisher, naive_diag_fisher, rebatch
from fisher_unlearn.networks.models import build_model


def close(a, b, tol):
    assert set(a) == set(b)
    for name in a:
        assert (a[name].double() - b[name].double()).abs().max() <= tol * b[
            name
        ].abs().max() + 1e-300, name


def loops(model, batches, labels, per, mean):
    "The table of formulas as loops over images and classes, by backward() on one scalar at a time."
    model = copy.deepcopy(model).double().eval()
    total, terms = {n: torch.zeros_like(p) for n, p in model.named_parameters()}, 0

    def slopes(x, y):
        model.zero_grad()
        z = model(x[None].double())[0]
        (torch.logsumexp(z, 0) - z[y]).backward()
        return {
            n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for n, p in model.named_parameters()
        }

    for x, y in batches:
        p = torch.stack([torch.softmax(model(one[None].double())[0].detach(), 0) for one in x])
        classes = [None] if labels == "true" else range(p.shape[1])
        for c in classes:
            g = [slopes(one, target if c is None else c) for one, target in zip(x, y)]
            for n in total:
                stacked = torch.stack([s[n] for s in g])
                if per == "batch":
                    total[n] += (1 if c is None else p[:, c].mean()) * stacked.mean(0) ** 2
                else:
                    total[n] += sum(
                        (1 if c is None else p[i, c]) * s**2 for i, s in enumerate(stacked)
                    )
        terms += len(x) if per == "sample" else 1
    return {n: t / terms if mean else t for n, t in total.items()}


class Tied(nn.Module):
    "One linear map used twice, and a weight outside of any module."

    def __init__(self):
        super().__init__()
        self.inner, self.free, self.head = (
            nn.Linear(6, 6),
            nn.Parameter(torch.randn(6)),
            nn.Linear(6, 3),
        )

    def forward(self, x):
        x = x.flatten(1)
        return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x))) * self.free))


NETWORKS = {
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 2, groups=2),
        nn.Flatten(),
        nn.LazyLinear(3),
    ),
    "tied": Tied,
    "norms": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 1),
        nn.GroupNorm(2, 4),
        nn.GELU(),
        nn.Flatten(),
        nn.LayerNorm(24),
        nn.LazyLinear(3),
    ),
}


def case(name, sizes, seed=0):
    torch.manual_seed(seed)
    model = NETWORKS[name]()
    data = [(torch.randn(n, 1, 2, 3), torch.randint(3, (n,))) for n in sizes]
    model.train()(torch.randn(8, 1, 2, 3))  # moves BatchNorm's statistics and makes lazy layers
    return model.double(), [(x.double(), y) for x, y in data]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("labels", ["true", "expected"])
@pytest.mark.parametrize("per", ["sample", "batch"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_every_estimator_is_its_formula(name, labels, per, reduction):
    model, data = case(name, (4, 4, 1))
    wanted = loops(model, data, labels, per, reduction == "mean")
    close(diag_fisher(model, data, labels, per, reduction), wanted, 1e-10)
    close(naive_diag_fisher(model, data, labels, per, reduction), wanted, 1e-10)
    close(
        diag_fisher(
            copy.deepcopy(model).float(), [(x.float(), y) for x, y in data], labels, per, reduction
        ),
        wanted,
        1e-4,
    )


def test_sampled_labels_are_the_ones_drawn_and_the_seed_fixes_them(monkeypatch):
    model, data = case("convolutions", (5, 5))
    drawn, draw = [], fisher._drawn
    monkeypatch.setattr(fisher, "_drawn", lambda *a: drawn.append(draw(*a)) or drawn[-1])
    found = diag_fisher(model, data, "sampled", seed=3)
    assert [len(y) for y in drawn] == [5, 5]
    close(
        found,
        loops(model, [(x, y) for (x, _), y in zip(data, drawn)], "true", "sample", False),
        1e-10,
    )
    a, b, c = (diag_fisher(model, data, "sampled", seed=s) for s in (3, 3, 4))
    assert all(torch.equal(a[n], b[n]) for n in a) and not all(torch.equal(a[n], c[n]) for n in a)


def test_sampled_converges_to_expected():
    model, data = case("tied", (6,))
    wanted = diag_fisher(model, data, "expected")
    draws = [diag_fisher(model, data, "sampled", seed=s) for s in range(400)]
    for name in wanted:
        mean, spread = (
            torch.stack([d[name] for d in draws]).mean(0),
            torch.stack([d[name] for d in draws]).std(0),
        )
        assert ((mean - wanted[name]).abs() <= 5 * spread / 400**0.5 + 1e-12).all()


def test_batches_of_one_make_both_kinds_equal():
    model, data = case("convolutions", (1, 1, 1, 1))
    for labels in ("true", "expected"):
        close(
            diag_fisher(model, data, labels, "batch"),
            diag_fisher(model, data, labels, "sample"),
            1e-10,
        )


def test_scoring_leaves_everything_as_it_was(original, request_zero):
    model = copy.deepcopy(original).train()
    model.features[0].eval()
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    before, modes, state = (
        copy.deepcopy(model.state_dict()),
        [m.training for m in model.modules()],
        torch.get_rng_state(),
    )
    for labels, per in (("true", "sample"), ("expected", "batch"), ("sampled", "sample")):
        diag_fisher(model, request_zero.forget.batches(64), labels, per)
    assert (
        all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        and [m.training for m in model.modules()] == modes
    )
    assert torch.equal(torch.get_rng_state(), state)
    grads = [p.grad for p in model.parameters()]
    assert torch.equal(grads[0], torch.ones_like(grads[0])) and all(g is None for g in grads[1:])


def test_frozen_parameters_are_left_out_and_used(original, request_zero):
    model, batches = copy.deepcopy(original), request_zero.forget.batches(64)
    whole = diag_fisher(model, batches)
    for p in model.features[0].parameters():
        p.requires_grad_(False)
    part = diag_fisher(model, batches)
    assert set(whole) - set(part) == {
        "features.0.0.weight",
        "features.0.1.weight",
        "features.0.1.bias",
    }
    close(part, {n: whole[n] for n in part}, 1e-5)


@pytest.mark.parametrize("name", ["resnet20", "vgg16", "googlenet", "densenet"])
def test_float32_on_the_papers_networks_agrees_with_loops(name):
    model = build_model(name, 4, 1, seed=0).eval()
    x, y = torch.randn(3, 1, 32, 32), torch.tensor([0, 3, 1])
    wanted = naive_diag_fisher(model, [(x, y)])
    found = diag_fisher(model, [(x, y)])
    for n in wanted:
        assert (found[n] - wanted[n]).abs().max() <= 2e-3 * wanted[n].abs().max() + 1e-12, n


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 12))
def test_rebatch_keeps_order_and_content(sizes, size):
    y = torch.arange(sum(sizes))
    again = list(rebatch(list(zip(y.float().split(sizes), y.split(sizes))), size))
    assert torch.equal(torch.cat([b for _, b in again]), y) and torch.equal(
        torch.cat([a for a, _ in again]), y.float()
    )
    assert all(len(b) == size for _, b in again[:-1]) and 0 < len(again[-1][1]) <= size


def test_rebatch_says_that_sizes_differ():
    two = [(torch.zeros(2, 1, 6, 6), torch.zeros(2)), (torch.zeros(2, 1, 8, 8), torch.zeros(2))]
    with pytest.raises(ValueError, match=r"shapes \(1, 6, 6\) and \(1, 8, 8\)"):
        list(rebatch(two, 3))


def test_rebatch_reads_a_shuffling_loader_in_order_and_can_be_read_again():
    data = TensorDataset(torch.arange(10.0), torch.arange(10))
    again = rebatch(DataLoader(data, 3, shuffle=True), 4)
    for _ in range(2):
        assert [y.tolist() for _, y in again] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    subset = rebatch(DataLoader(data, 3, sampler=torch.utils.data.SubsetRandomSampler([1, 2])), 4)
    assert sorted(next(iter(subset))[1].tolist()) == [1, 2]


def test_bad_input_is_one_sentence():
    model, data = case("convolutions", (4,))
    x, y = data[0]
    frozen, broken = copy.deepcopy(model).requires_grad_(False), copy.deepcopy(model)
    infinite = copy.deepcopy(model)
    infinite[3].weight.data[0, 0, 0, 0] = float("inf")
    broken[3].register_full_backward_hook(
        lambda module, *_: (torch.full_like(_[0][0], float("nan")),)
    )
    for bad, kind, message in [
        (
            lambda: diag_fisher(frozen, data),
            ValueError,
            "no parameter of the model requires a gradient",
        ),
        (lambda: diag_fisher(model, iter(data)), TypeError, "only once"),
        (lambda: diag_fisher(model, []), ValueError, "is empty"),
        (lambda: diag_fisher(model, data, per="image"), ValueError, "`per` is 'image'"),
        (lambda: diag_fisher(model, data, reduction="none"), ValueError, "`reduction` is 'none'"),
        (
            lambda: diag_fisher(model, [*data, (x, y + 3)]),
            ValueError,
            "but the model has 3 classes",
        ),
        (lambda: diag_fisher(nn.Conv2d(1, 4, 1).double(), data), ValueError, "must return logits"),
        (
            lambda: diag_fisher(model, [(x, y), (x * float("inf"), y)]),
            ValueError,
            "batch 1 of `batches` has inputs that are NaN",
        ),
        (
            lambda: diag_fisher(broken, data),
            FloatingPointError,
            "the gradients of `1.bias` are not finite",
        ),
        (
            lambda: diag_fisher(infinite, data),
            FloatingPointError,
            "the output of the layer `3` is not finite",
        ),
        (lambda: diag_fisher(model, [(x.byte(), y)]), TypeError, "bytes"),
    ]:
        with pytest.raises(kind, match=message):
            bad()


def test_probabilities_near_one_keep_their_digits():
    """p − 1 in single precision would be 0 or rounded; the empirical Fisher of a fitted model
    lives there."""
    model = nn.Linear(2, 3, bias=False)
    model.weight.data = torch.tensor([[9.0, 0.0], [-9.0, 1.0], [0.0, -9.0]])
    data = [(torch.tensor([[2.0, 0.5], [1.0, 1.0]]), torch.tensor([0, 0]))]
    close(diag_fisher(model, data), loops(model, data, "true", "sample", False), 1e-5)


@given(st.lists(st.lists(st.floats(-60, 60), min_size=4, max_size=4), min_size=1, max_size=5))
def test_one_direction_less_than_classes_has_the_same_squares(logits):
    p = torch.tensor(logits, dtype=torch.float64).softmax(1)
    found = sum(s[:, :, None] * s[:, None] for s in fisher._factors(p))
    assert (found - (torch.diag_embed(p) - p[:, :, None] * p[:, None])).abs().max() < 1e-14
    single = sum(s.double()[:, :, None] * s.double()[:, None] for s in fisher._factors(p.float()))
    assert (single - found).abs().max() < 1e-6 and single.isfinite().all()


@pytest.mark.slow
def test_two_processes_have_the_sums_of_one(tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "0",
        "--standalone",
        str(Path(__file__).parent / "rank.py"),
        str(tmp_path),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
        timeout=300,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("every rank must get the same batches") == 2
    alone, (first, second) = (
        rank.scores(),
        (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in (0, 1)),
    )
    assert set(alone) == set(first) == set(second)
    for key in alone:
        assert all(torch.equal(first[key][n], second[key][n]) for n in first[key])
        close(first[key], alone[key], 1e-6)
