"""The rule of the noise against plain NumPy, entry by entry, and the noise against its own seed
and moments."""

import copy
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fisher_unlearn.methods.noise import FisherNoise, add_noise_, noise_moments

CODE = FisherNoise.presets["authors_code"]  # the rule of the public code


def slow_std(h, alpha, exponent, clamp, averaged, row, head, rows):
    "The steps of the public code in their order, by loops."
    h, v = np.asarray(h, np.float64), np.empty(h.shape)
    for i in np.ndindex(*h.shape):
        v[i] = alpha * min(1 / (h[i] + 1e-8), clamp / 10 if head else clamp)
    if averaged and v.ndim > 1:
        old = v.copy()
        for i in np.ndindex(*v.shape):
            v[i] = np.mean([old[(i[0], j, *i[2:])] for j in range(v.shape[1])])
    if row and head:
        for f in rows:
            v[f] = 1e-4
    if averaged and (head or v.ndim == 1):
        v = v * 10
    return v**exponent


@given(
    st.sampled_from([(4,), (4, 3), (4, 3, 2, 2)]),
    st.sampled_from([0.25, 0.5]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1e3, 5.0]),
    st.integers(0, 10**6),
)
@settings(max_examples=80)
def test_moments_are_the_rule(shape, exponent, averaged, row, head, clamp, seed):
    rng = np.random.default_rng(seed)
    h, w = 10.0 ** rng.uniform(-10, 1, shape), rng.normal(size=shape)
    mean, std = noise_moments(
        torch.tensor(w),
        torch.tensor(h),
        FisherNoise(
            noise_alpha=2e-6,
            noise_exponent=exponent,
            noise_clamp=clamp,
            noise_averaged=averaged,
            noise_row=row,
        ),
        head,
        [1, 3],
    )
    assert np.allclose(
        std.numpy(), slow_std(h, 2e-6, exponent, clamp, averaged, row, head, [1, 3]), rtol=1e-12
    )
    gone = [1, 3] if row and head else []
    assert (mean.numpy()[gone] == 0).all() and np.array_equal(
        np.delete(mean.numpy(), gone, 0), np.delete(w, gone, 0)
    )


def test_noise_has_its_moments_and_follows_its_seed():
    """Over all weights of a network, the noise divided by its spread is standard normal; the
    draw is that of one generator in the order of declaration."""
    torch.manual_seed(0)
    layers = {
        "first": nn.Conv2d(1, 32, 3),
        "norm": nn.BatchNorm2d(32),
        "second": nn.Conv2d(32, 128, 3),
        "classifier": nn.Linear(128, 10),
    }
    model = nn.Sequential(OrderedDict(layers))
    fisher = {n: torch.rand(p.shape) for n, p in model.named_parameters()}
    before = copy.deepcopy(model)
    noisy = add_noise_(copy.deepcopy(model), fisher, CODE, "classifier", [0], seed=5)
    generator, drawn = torch.Generator().manual_seed(5), []
    for (name, old), new in zip(before.named_parameters(), noisy.parameters()):
        head = name.startswith("classifier")
        std = torch.tensor(slow_std(fisher[name].numpy(), 1e-6, 0.5, 1e3, True, True, head, [0]))
        mean = old.detach().double().clone()
        if head:
            mean[0] = 0
        expected = torch.randn(old.shape, generator=generator)
        assert torch.allclose((new.detach().double() - mean) / std, expected.double(), atol=2e-3)
        drawn.append(((new.detach() - mean) / std).flatten())
    every = torch.cat(drawn)
    assert abs(every.mean()) < 0.01 and abs(every.std() - 1) < 0.01
    for (name, old), new in zip(before.named_buffers(), noisy.buffers()):
        assert torch.equal(old, new), name
    again, other = (
        add_noise_(copy.deepcopy(model), fisher, CODE, "classifier", [0], seed=s) for s in (5, 6)
    )
    assert all(torch.equal(a, b) for a, b in zip(noisy.parameters(), again.parameters()))
    assert not any(torch.equal(a, b) for a, b in zip(noisy.parameters(), other.parameters()))


def test_frozen_parameters_have_no_fisher_and_get_no_noise():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    add_noise_(
        model,
        {n: torch.zeros_like(p) for n, p in model.named_parameters() if p.requires_grad},
        CODE,
        "1",
        [0],
        seed=0,
    )
    assert torch.equal(before, model[0].weight)


@pytest.mark.parametrize(
    "bad",
    [
        {"noise_alpha": 0},
        {"noise_exponent": -1},
        {"noise_clamp": 0},
        {"noise_alpha": float("nan")},
    ],
)
def test_rules_that_make_no_sense_are_refused(bad):
    with pytest.raises(ValueError, match="`noise_.*` is .*: it must be a finite number above 0"):
        FisherNoise(**bad)
