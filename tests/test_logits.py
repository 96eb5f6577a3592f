"""A foreign output becomes logits, or one sentence; probabilities are noticed."""

import warnings
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
import torchvision
from torch import nn

from fisher_unlearn.networks.logits import probabilities, read_logits, warn_of_probabilities

Z = torch.randn(4, 10)


@pytest.mark.parametrize(
    "output",
    [
        Z,
        (Z,),
        [Z],
        (Z, Z + 1),
        (Z, torch.tensor(2.0)),
        (Z, torch.randn(4, 3, 5)),
        (Z, None),
        {"logits": Z},
        {"out": Z, "n": 4},
        {"logits": Z, "hidden": Z[:, :3]},
        SimpleNamespace(logits=Z, loss=None),
        namedtuple("Out", "features logits")(Z[:, :3], Z),
    ],
)
def test_logits_are_found(output):
    assert read_logits(output) is Z


@pytest.mark.parametrize(
    "output",
    [
        None,
        "text",
        (),
        {},
        (Z[:, :3], Z),
        (Z, Z[:, :3]),
        {"a": Z, "b": Z},
        [[Z]],
        (Z[0], Z),
        SimpleNamespace(logits=None),
    ],
)
def test_what_could_be_read_in_two_ways_is_one_sentence(output):
    with pytest.raises(ValueError, match="wrap the model so that it returns its logits"):
        read_logits(output)


def test_googlenet_in_training_mode_has_auxiliary_outputs():
    model = torchvision.models.googlenet(
        weights=None, num_classes=5, aux_logits=True, init_weights=False
    ).train()
    assert read_logits(model(torch.randn(2, 3, 64, 64))).shape == (2, 5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_probabilities_are_noticed_and_logits_are_not(dtype):
    z = (3 * torch.randn(16, 10, generator=torch.Generator().manual_seed(0))).to(dtype)
    for activation, found in [
        (nn.Softmax(1), "a softmax"),
        (nn.Sigmoid(), "a sigmoid"),
        (nn.LogSoftmax(1), None),
        (nn.ReLU(), None),
        (nn.Identity(), None),
        (nn.Tanh(), None),
    ]:
        assert probabilities(activation(z)) == found
    assert probabilities(torch.zeros(16, 10)) is None
    assert probabilities(torch.full((16, 10), 0.25)) is None
    assert probabilities(torch.eye(10)) is None


def test_the_warning_names_the_remedy():
    with pytest.warns(
        UserWarning,
        match="those of a softmax, in .0, 1. with rows that sum to one: .*leave the model's "
        "last activation out",
    ):
        warn_of_probabilities(Z.softmax(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_probabilities(Z)
