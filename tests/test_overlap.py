"""Forget and remain sets that have samples in common, and methods for whole classes."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from fisher_unlearn import unlearn
from fisher_unlearn.images.overlap import overlap

X = torch.randn(40, 1, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(40) % 4


def net():
    torch.manual_seed(0)
    head = nn.Linear(4, 4)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def loader(where, size=7, **more):
    return DataLoader(TensorDataset(X[where], Y[where]), batch_size=size, **more)


class Augmented:
    "Samples that come differently at each reading."

    def __init__(self, where):
        self.where = where

    def __iter__(self):
        yield X[self.where] + 0.1 * torch.randn(1), Y[self.where]


def slow_overlap(forget, remain):
    "Each sample against each, bit by bit."
    kept = [(x, y) for batch in remain for x, y in zip(*batch)]
    same = lambda a, b: a[1] == b[1] and torch.equal(a[0], b[0])
    lost = [(x, y) for batch in forget for x, y in zip(*batch)]
    return sum(any(same(a, b) for b in kept) for a in lost)


@pytest.mark.parametrize("start", range(0, 40, 9))
def test_shared_samples_are_those_of_the_definition(start):
    lost, kept = loader(slice(0, 20)), loader(slice(start, 40), size=5)
    found = overlap(lost, kept)
    assert found.shared == slow_overlap(lost, kept) == max(0, 20 - start)
    assert (found.forget, found.remain, found.redrawn) == (20, 40 - start, False)
    assert dict(found.labels) == {c: int((Y[start:] == c).sum()) for c in range(4)}


def test_order_batches_and_dicts_make_no_difference_and_labels_do():
    lost = loader(slice(0, 10), shuffle=True)
    kept = [{"image": X[k : k + 3], "label": Y[k : k + 3]} for k in range(5, 38, 3)]
    assert overlap(lost, kept).shared == 5
    assert overlap(lost, [(X, (Y + 1) % 4)]).shared == 0
    assert overlap([(X[:3].int(), Y[:3])], [(X.round(), Y)]).shared == 0


def test_double_precision_hides_nothing():
    for kind in (torch.float32, torch.float64):
        assert overlap([(X[:3].to(kind), Y[:3])], [(X.double(), Y)]).shared == 3
    assert overlap([(2**53 + X[:3].long(), Y[:3])], [(2**53 + 1 + X[:3].long(), Y[:3])]).shared == 0


def test_a_remain_set_that_is_drawn_anew_is_known_by_it():
    found = overlap(loader(slice(0, 8)), Augmented(slice(0, 40)))
    assert found.redrawn and not found.shared
    for shuffled in (
        loader(slice(5, 40), shuffle=True),
        loader(slice(8, 40), size=1, shuffle=True),
    ):
        assert not overlap(loader(slice(0, 8)), shuffled).redrawn


def test_reading_leaves_all_generators_as_they_were():
    own = torch.Generator().manual_seed(3)
    kept = loader(slice(10, 40), shuffle=True, generator=own)
    before = torch.get_rng_state(), own.get_state(), np.random.get_state()[1].tolist()
    overlap(Augmented(slice(0, 10)), kept)
    nested = BatchSampler(RandomSampler(range(30), generator=own), 7, drop_last=False)
    overlap(Augmented(slice(0, 10)), DataLoader(kept.dataset, batch_sampler=nested))
    after = torch.get_rng_state(), own.get_state(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert before[2] == after[2]


@pytest.mark.parametrize("method", ["fisher_mask", "finetune", "random_mask"])
def test_samples_that_would_be_learned_again_are_refused_before_any_work(method):
    model = net()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="3 of the 8 samples to forget are in the remain set"):
        unlearn(model, loader(slice(0, 8)), loader(slice(5, 40)), method=method)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    unlearn(model, loader(slice(0, 8)), loader(slice(5, 40)), method=method, check_sets=False)


def test_a_second_request_that_brings_the_first_one_back_is_refused():
    "The remain set of the second must not hold what the first one named."
    first = unlearn(
        net(), loader(slice(0, 8)), loader(slice(8, 40)), method="random_mask", ratio=0.2
    )
    with pytest.raises(ValueError, match="are in the remain set too"):
        both = [*loader(slice(0, 8)), *loader(slice(8, 12))]
        unlearn(first.model, both, loader(slice(0, 40)), method="random_mask", ratio=0.2)


def test_methods_for_whole_classes_are_refused_where_some_of_a_class_is_to_remain():
    one = [(X[:1], Y[:1])]
    with pytest.raises(ValueError, match="`mask_classifier` forgets whole classes .* 9 samples"):
        unlearn(net(), one, loader(slice(1, 40)), method="mask_classifier")
    rest = [(X[Y > 0], Y[Y > 0])]
    unlearn(net(), [(X[Y == 0], Y[Y == 0])], rest, method="mask_classifier")


def test_what_cannot_be_known_and_what_looks_swapped_is_warned_of():
    with pytest.warns(UserWarning, match="comes differently at each reading"):
        unlearn(
            net(), Augmented(slice(0, 8)), loader(slice(8, 40)), method="random_mask", ratio=0.2
        )
    with pytest.warns(UserWarning, match="remain set comes differently at each reading"):
        unlearn(
            net(), loader(slice(0, 8)), Augmented(slice(0, 40)), method="random_mask", ratio=0.2
        )
    with pytest.warns(UserWarning, match="32 .*8.*swapped|8 samples.*32.*swapped"):
        unlearn(net(), loader(slice(8, 40)), loader(slice(0, 8)), method="random_mask", ratio=0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unlearn(net(), loader(slice(0, 8)), loader(slice(8, 40)), method="random_mask", ratio=0.2)
