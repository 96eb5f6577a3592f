"""A tensor of a model's state is one thing under all of its names."""

import copy
import functools
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from fisher_unlearn.networks.models import check_batch
from fisher_unlearn.networks.parameters import (
    by_first_name,
    copied,
    first_name,
    maskable,
    parameters_by_name,
    state_names,
    unwrapped,
)
from fisher_unlearn.scores.fisher import diag_fisher
from fisher_unlearn.scores.gradients import loss_gradient


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


def by_list(net):
    first, second = net
    net[0].steps = [lambda x: x @ first.weight.T, (1, lambda x: x)]
    net.forward = lambda x: second(net[0].steps[0](x))


def by_mapping(net):
    layer = net[0]
    layer.ways = {"all": {"first": lambda x: x @ layer.weight.T}}
    layer.forward = lambda x: layer.ways["all"]["first"](x)


def by_keyword(net):
    def forward(x, *, layer=net[0]):
        return x @ layer.weight.T

    net[0].forward = forward


def by_cache(net):
    layer = net[0]
    kept = functools.lru_cache(None)(lambda key: layer.weight)
    layer.forward = lambda x: x @ kept(0).T


def by_weak_reference(net):
    seen = net[0].seen = weakref.ref(net[0])
    net[0].forward = lambda x: x @ seen().weight.T


class Holder:
    "Someone's object, that a network keeps."

    def __init__(self, call):
        self.call = call


def by_object(net):
    layer = net[0]
    layer.holder = holder = Holder(lambda x: x @ layer.weight.T)
    layer.forward = lambda x: holder.call(x)


def by_hook(net):
    net[0].register_forward_hook(lambda module, args, output: output + args[0] @ net[0].weight.T)


def by_root(net):
    first, second = net
    net.forward = lambda x: second(first(x))


EDITS = [by_closure, by_tensor, by_default, by_nested, by_hook, by_root, by_list, by_mapping]
EDITS += [by_keyword, by_cache, by_weak_reference, by_object]


@pytest.mark.parametrize("edit", EDITS)
def test_a_copy_computes_with_its_own_weights(edit):
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 2, bias=False))
    edit(net)
    x, before = torch.randn(4, 3), [p.clone() for p in net.parameters()]
    wanted = net(x)
    made = copied(net)
    torch.testing.assert_close(made(x), wanted)
    for zeros in range(2):  # either layer alone makes the logits zero
        again = copied(net)
        nn.init.zeros_(again[zeros].weight)
        assert torch.equal(again(x), torch.zeros(4, 2))
    made(x).sum().backward()
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(net(x), wanted) and all(
        torch.equal(a, b) for a, b in zip(net.parameters(), before)
    )


def test_a_function_that_holds_nothing_of_the_network_stays_itself():
    net, scale = nn.Sequential(nn.Linear(3, 3)), torch.ones(3)
    hook = lambda module, args, output: output * scale
    net[0].register_forward_hook(hook)
    assert list(copied(net)[0]._forward_hooks.values()) == [hook]


def test_a_copy_shares_buffers_and_other_tensors_with_parameters():
    model = nn.Linear(3, 4)
    model.register_buffer("seen", model.weight.detach())
    model.register_buffer("turned", model.weight.detach().t())
    model.kept = [model.bias.detach()]
    made = copied(model)
    made.weight.data[1, 2], made.bias.data[0] = 7, 8
    assert made.seen[1, 2] == made.turned[2, 1] == 7
    assert made.kept[0][0] == 8
    assert not bool((model.seen == 7).any() | (model.turned == 7).any() | (model.bias == 8).any())


def aside(net):
    "A network with an object out of reach of copies, in a function, that holds the first layer."
    box = Holder(net[0])
    net[0].forward = lambda x: x @ box.call.weight.T


def frozen(net):
    "The same, without gradients."
    aside(net)
    call, net[0].forward = net[0].forward, None
    net[0].forward = torch.no_grad()(call)


@pytest.mark.parametrize("edit", [aside, frozen])
def test_a_copy_that_computes_with_the_original_is_refused(edit):
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 2, bias=False))
    edit(net)
    batch = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    assert check_batch(net, *batch) == 2  # the network itself is fine
    with pytest.raises(ValueError, match="compute with `0.weight` of the model itself"):
        check_batch(copied(net), *batch)


class Odd(nn.Module):
    "Unused and frozen parts, and one logit that nothing changes."

    def __init__(self):
        super().__init__()
        self.unused, self.layer = nn.Linear(2, 2), nn.Linear(3, 1)
        self.layer.weight.requires_grad_(False)

    def forward(self, x):
        return torch.cat([self.layer(x), torch.ones(len(x), 1)], 1)


@pytest.mark.parametrize("edit", [*EDITS, lambda net: None])
def test_copies_that_compute_by_themselves_are_taken(edit):
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 2, bias=False))
    edit(net)
    for made in (copied(net), copied(copied(net)), copied(Odd())):
        assert check_batch(made, torch.randn(4, 3), torch.tensor([0, 1, 0, 1])) == 2


def test_a_result_outlives_the_original():
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 2, bias=False))
    by_weak_reference(net)
    x = torch.randn(4, 3)
    made, wanted = copied(net), net(x)
    del net
    gc.collect()
    torch.testing.assert_close(made(x), wanted)


def lazy():
    return nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))


def scripted():
    return torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)))


def traced():
    return torch.jit.trace(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), torch.ones(2, 3))


def exported():
    return torch.export.export(nn.Linear(3, 2), (torch.ones(4, 3),)).module()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "build, said",
    [
        (lazy, "run one batch through it first"),
        (scripted, "by TorchScript: pass the nn.Module"),
        (traced, "by TorchScript: pass the nn.Module"),
        (exported, "by `torch.export`: pass the nn.Module"),
    ],
)
@pytest.mark.parametrize(
    "use",
    [
        copied,
        lambda model: check_batch(model, torch.ones(4, 3), torch.tensor([0, 1, 0, 1])),
        lambda model: diag_fisher(model, [(torch.ones(4, 3), torch.tensor([0, 1, 0, 1]))]),
    ],
)
def test_models_whose_layers_cannot_be_reached_are_refused_in_a_sentence(build, said, use):
    with pytest.raises(ValueError, match=said):
        use(build())


class Twice(nn.Module):
    "A matrix in two places: as one parameter, or as two objects for one memory."

    def __init__(self, weight, again):
        super().__init__()
        self.first, self.second = weight, again
        self.head = nn.Linear(3, 2, bias=False)
        nn.init.eye_(self.head.weight)

    def forward(self, x):
        return self.head(torch.tanh(torch.tanh(x @ self.first) @ self.second))


def matrix():
    return nn.Parameter(torch.arange(9.0).view(3, 3) / 9)


def test_two_parameters_on_one_memory_have_one_gradient():
    one, two, x = matrix(), matrix(), torch.randn(4, 3)
    tied, shared = Twice(one, one), Twice(two, nn.Parameter(two.data))
    batches = [(x, torch.tensor([0, 1, 0, 1]))]
    for score in (diag_fisher, loss_gradient):
        wanted, found = score(tied, batches), score(shared, batches)
        assert list(found) == list(wanted) == ["first", "head.weight"]
        torch.testing.assert_close(found, wanted)
    assert shared.second is not shared.first
    assert [n for n, _ in shared.named_parameters()] == ["first", "second", "head.weight"]


def test_parameters_that_share_some_entries_are_refused():
    batches = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))]
    for view in (lambda w: w.t(), lambda w: w[:1].expand(3, 3)):
        whole = matrix()
        model = Twice(whole, nn.Parameter(view(whole.data)))
        with pytest.raises(ValueError, match="`first` and `second` share memory"):
            diag_fisher(model, batches)
    held = torch.randn(6, 3)
    apart = Twice(nn.Parameter(held[::2]), nn.Parameter(held[1::2]))  # interleaved, and apart
    assert len(diag_fisher(apart, batches)) == 3
