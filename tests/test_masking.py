"""Selection against a slow oracle: a sorted list of (score, position), one unit at a time."""
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fisher_unlearn.masking import candidates, masked_rows, masked_units, quota, select_top, zero_


def network():
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1, bias=False), nn.Flatten(), nn.Linear(8, 4), nn.Linear(4, 2))


def slow_top(scores, ratio, unit):
    "Every unit as a list of its positions, the best by a stable sort of plain floats."
    units = []
    for name, s in scores.items():
        lead = {"weight": s.ndim, "kernel": 2, "channel": 1}[unit]
        for index in np.ndindex(*s.shape[:lead]): units.append((float(np.mean(s[index], dtype=np.float64)), name, index))
    best = sorted(range(len(units)), key=lambda k: (-units[k][0], k))[:int(Fraction(str(ratio)) * len(units))]
    masks = {name: np.zeros(s.shape, bool) for name, s in scores.items()}
    for k in best: masks[units[k][1]][units[k][2]] = True
    return masks


@given(st.sampled_from(["weight", "kernel", "channel"]), st.booleans(), st.integers(0, 99), st.integers(0, 1000), st.booleans())
@settings(max_examples=60)
def test_the_top_is_the_slow_top(unit, classifier, percent, seed, ties):
    model, rng = network(), np.random.default_rng(seed)
    pool = candidates(model, unit, classifier)
    # eighths are summed exactly, so equal means are equal in both
    scores = {n: (rng.integers(-2, 3, s) if ties else rng.integers(-2**18, 2**18, s)) / 8 for n, s in pool.shapes.items()}
    ratio = percent / 100
    mask = select_top({n: torch.from_numpy(s) for n, s in scores.items()}, ratio, pool)
    wanted = slow_top(scores, ratio, unit)
    for name, where in wanted.items():
        assert np.array_equal(mask[name].numpy() if name in mask else np.zeros_like(where), where)
        if name in pool.biases and where.any(): assert np.array_equal(mask[pool.biases[name]].numpy(), where.reshape(len(where), -1).any(1))
    assert sum(masked_units(mask, pool).values()) == quota(ratio, len(pool)) and set(mask) <= {*pool.shapes, *pool.biases.values()}


@given(st.integers(0, 999), st.integers(0, 10**6))
def test_the_quota_is_exact_in_decimal(thousandths, n):
    assert quota(thousandths / 1000, n) == thousandths * n // 1000


def test_the_quota_is_filled_even_if_no_score_is_positive():
    pool = candidates(network())
    scores = {n: -torch.ones(s) for n, s in pool.shapes.items()}
    mask = select_top(scores, .5, pool)
    flat = torch.cat([mask.get(n, torch.zeros(s, dtype=torch.bool)).flatten() for n, s in pool.shapes.items()])
    assert flat.sum() == len(pool) // 2 and flat[:len(pool) // 2].all()  # of equal scores the first in module order


def test_the_pool_holds_no_batchnorm_no_bias_and_the_classifier_only_if_asked():
    assert set(candidates(network()).shapes) == {"0.weight", "3.weight", "5.weight"}
    assert set(candidates(network(), classifier=True).shapes) == {"0.weight", "3.weight", "5.weight", "6.weight"}
    assert set(candidates(network(), classifier_name="5").shapes) == {"0.weight", "3.weight", "6.weight"}
    assert len(candidates(network(), "kernel")) == 6 + 6 + 32 and len(candidates(network(), "channel", True)) == 3 + 2 + 4 + 2
    assert candidates(network(), "channel").biases == {"0.weight": "0.bias", "5.weight": "5.bias"}


@pytest.mark.parametrize("ratio", [-.1, 1, 1.5, float("nan")])
def test_ratios_outside_0_1_are_refused(ratio):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\)"): quota(ratio, 10)


def test_scores_that_cannot_be_ranked_are_refused_by_name():
    pool = candidates(network())
    scores = {n: torch.zeros(s) for n, s in pool.shapes.items()}
    for bad, message in [({"3.weight": torch.full((2, 3, 1, 1), float("nan"))}, "`3.weight` are not all numbers"), ({"0.weight": torch.zeros(3)}, "must have its shape"), ({"0.weight": None}, "must have its shape")]:
        given_scores = {n: s for n, s in {**scores, **bad}.items() if s is not None}
        with pytest.raises(ValueError, match=message): select_top(given_scores, .1, pool)
    with pytest.raises(ValueError, match="`unit` is 'layer'"): candidates(network(), "layer")
    with pytest.raises(ValueError, match="nothing to mask"): candidates(nn.Sequential(nn.Linear(3, 2)))


def test_zeroing_touches_the_masked_entries_and_no_others():
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    mask = {"0.weight": torch.rand(3, 2, 2, 2) < .5, "1.running_mean": torch.tensor([True, False, True])}
    before["1.running_mean"] += 5
    model[1].running_mean += 5
    zero_(model, mask)
    for name, value in model.state_dict().items():
        where = mask.get(name, torch.zeros_like(value, dtype=torch.bool))
        assert (value[where] == 0).all() and torch.equal(value[~where], before[name][~where])
    assert masked_rows(mask, "0.weight", 3) == mask["0.weight"].flatten(1).sum(1).tolist() and masked_rows({}, "0.weight", 3) == [0, 0, 0]
    with pytest.raises(ValueError, match="no entry of the model"): zero_(model, {"9.weight": torch.ones(1, dtype=torch.bool)})
