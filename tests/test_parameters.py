"""A tensor of a model's state is one thing under all of its names."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from fisher_unlearn.networks.parameters import (
    by_first_name,
    copied,
    first_name,
    maskable,
    parameters_by_name,
    state_names,
    unwrapped,
)


class Aliased(nn.Module):
    "One module under two names, a weight tied to another layer's, and one that shares memory only."

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = self.a
        self.c = nn.Linear(3, 3)
        self.c.weight = self.a.weight
        self.d = nn.Linear(3, 3)
        self.d.weight.data = self.a.weight.data
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.d(self.c(self.b(self.a(x)))))


def test_each_tensor_has_one_first_name():
    names = state_names(Aliased())
    assert {n for n, first in names.items() if first == "a.weight"} == {
        "a.weight",
        "b.weight",
        "c.weight",
        "d.weight",
    }
    assert names["b.bias"] == "a.bias"
    assert names["c.bias"] == "c.bias"
    assert set(names) == set(Aliased().state_dict())
    assert list(parameters_by_name(Aliased())) == [
        "a.weight",
        "a.bias",
        "c.bias",
        "d.bias",
        "norm.weight",
        "norm.bias",
    ]


def test_parameters_without_memory_are_told_apart():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].bias = model[0].bias
    assert state_names(model) == {
        "0.weight": "0.weight",
        "0.bias": "0.bias",
        "1.weight": "1.weight",
        "1.bias": "0.bias",
    }


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, torch.compile, lambda m: nn.DataParallel(torch.compile(m))]
)
def test_wrappers_are_seen_through(wrap):
    model = Aliased()
    wrapped = wrap(model)
    inner, prefix = unwrapped(wrapped)
    assert inner is model
    assert {f"{prefix}{n}" for n in model.state_dict()} == set(wrapped.state_dict())
    assert (
        first_name(wrapped, "c.weight")
        == first_name(wrapped, f"{prefix}b.weight")
        == f"{prefix}a.weight"
    )


def test_a_module_with_a_child_called_module_is_no_wrapper():
    model = nn.Module()
    model.module = nn.Linear(2, 2)
    assert unwrapped(model) == (model, "")


@pytest.mark.parametrize("name", ["module.c.weight", "c.wieght", "weight", ""])
def test_unknown_names_are_refused_with_the_nearest(name):
    with pytest.raises(
        ValueError,
        match="`zeros` names .*, which is no parameter or buffer of the model: (did you "
        "mean|names are)",
    ):
        first_name(Aliased(), name, "`zeros`")


def test_marks_under_several_names_are_joined():
    one, two = torch.eye(3) > 0, torch.ones(3, 3) < 0
    two[0, 2] = True
    marks = by_first_name(Aliased(), {"b.weight": one, "d.weight": two, "c.bias": one[0]})
    assert set(marks) == {"a.weight", "c.bias"}
    assert torch.equal(marks["a.weight"], one | two)


def test_what_can_be_masked_of_pruned_and_parametrised_layers():
    for layer in (
        prune.l1_unstructured(nn.Linear(3, 3), "weight", 0.5),
        prune.random_structured(nn.Conv2d(3, 3, 1), "weight", 0.5, dim=0),
    ):
        assert (maskable(layer), maskable(layer, "bias")) == ("weight_orig", "bias")
    for layer in (
        weight_norm(nn.Linear(3, 3)),
        spectral_norm(nn.Linear(3, 3)),
        parametrizations.weight_norm(nn.Linear(3, 3)),
        parametrizations.orthogonal(nn.Linear(3, 3)),
    ):
        assert (maskable(layer), maskable(layer, "bias")) == (None, "bias")


@pytest.mark.filterwarnings("ignore")
def test_a_copy_has_what_was_computed_with_a_gradient():
    x = torch.randn(4, 3)
    pruned = nn.Sequential(
        nn.Linear(3, 3),
        prune.l1_unstructured(nn.Linear(3, 3), "weight", 0.5),
        weight_norm(nn.Linear(3, 3)),
    )
    pruned[0].kept = {"all": [pruned(x)]}
    with pytest.raises(RuntimeError):
        copy.deepcopy(pruned)
    again = copied(pruned)
    assert torch.equal(again(x), pruned(x))
    again(x).sum().backward()
    assert all(p.grad is None for p in pruned.parameters())
    assert pruned[0].kept["all"][0].grad_fn is not None


def test_a_copy_shares_memory_as_the_model_does():
    model = Aliased()
    model.e = nn.Linear(3, 3)
    model.e.weight = nn.Parameter(model.a.weight.detach().t())
    again = copied(model)
    assert state_names(again) == state_names(model)
    again.a.weight.data[0, 1] = 7
    assert again.d.weight[0, 1] == again.e.weight[1, 0] == 7
    assert model.a.weight[0, 1] != 7


def by_closure(net):
    old = net[0].forward
    net[0].forward = lambda x: 2 * old(x)


def by_tensor(net):
    weight = net[0].weight
    net[0].forward = lambda x: x @ weight.T


def by_default(net):
    def forward(x, layer=net[0]):
        return x @ layer.weight.T

    net[0].forward = forward


def by_nested(net):
    def masked(x):
        return x @ (net[0].weight * (net[0].weight > 0)).T

    net[0].forward = functools.partial(lambda call, x: call(x), masked)


def by_hook(net):
    net[0].register_forward_hook(lambda module, args, output: output + args[0] @ net[0].weight.T)


def by_root(net):
    first, second = net
    net.forward = lambda x: second(first(x))


@pytest.mark.parametrize("edit", [by_closure, by_tensor, by_default, by_nested, by_hook, by_root])
def test_a_copy_computes_with_its_own_weights(edit):
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 2, bias=False))
    edit(net)
    x, before = torch.randn(4, 3), [p.clone() for p in net.parameters()]
    wanted = net(x)
    made = copied(net)
    torch.testing.assert_close(made(x), wanted)
    with torch.no_grad():
        for p in made.parameters():
            p.zero_()
    assert torch.equal(made(x), torch.zeros(4, 2))
    assert torch.equal(net(x), wanted) and all(
        torch.equal(a, b) for a, b in zip(net.parameters(), before)
    )


def test_a_function_that_holds_nothing_of_the_network_stays_itself():
    net, scale = nn.Sequential(nn.Linear(3, 3)), torch.ones(3)
    hook = lambda module, args, output: output * scale
    net[0].register_forward_hook(hook)
    assert list(copied(net)[0]._forward_hooks.values()) == [hook]
