"""Gradients, Hessian products and the recursion against explicit Hessians in float64 and plain
loops."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fisher_unlearn.images.data import load_images
from fisher_unlearn.methods.influence import count_images, forget_gradient, hessian_product, lissa
from fisher_unlearn.networks.models import build_model


class Small(nn.Module):
    """A convolution, a BatchNorm with statistics, a smooth slope, a classifier, and a parameter
    that is never used."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head, self.unused = (
            nn.Conv2d(1, 2, 2),
            nn.BatchNorm2d(2),
            nn.Linear(2, 3),
            nn.Parameter(torch.ones(2)),
        )
        self.norm.running_mean += torch.tensor([0.1, -0.2])
        self.norm.running_var *= 2

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.conv(x))).mean((2, 3)))


@pytest.fixture
def case():
    torch.manual_seed(0)
    model = Small().double()
    x, y = torch.randn(9, 1, 4, 4).double(), torch.randint(3, (9,))
    return model, x, y


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def hessian_of(model, x, y):
    "The whole Hessian of the mean loss in evaluation mode."
    model.eval()
    names, sizes = [n for n, _ in model.named_parameters()], [p.numel() for p in model.parameters()]

    def loss(w):
        parts = {
            n: v.reshape(p.shape) for (n, p), v in zip(model.named_parameters(), w.split(sizes))
        }
        return F.cross_entropy(torch.func.functional_call(model, parts, x), y)

    found = torch.autograd.functional.hessian(loss, flat(model.parameters()).detach())
    model.train()
    return names, found


def test_the_gradient_is_the_sum_over_the_forget_set_by_all_images(case):
    model, x, y = case
    found = forget_gradient(model, [(x[:2], y[:2]), (x[2:5], y[2:5])], 9)
    slow = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    model.eval()
    for k in range(5):
        model.zero_grad()
        F.cross_entropy(model(x[k : k + 1]), y[k : k + 1]).backward()
        for n, p in model.named_parameters():
            slow[n] += 0 if p.grad is None else p.grad / 9
    assert (
        set(found) == set(slow)
        and all(torch.allclose(found[n], slow[n], atol=1e-14) for n in slow)
        and (found["unused"] == 0).all()
    )


def test_products_are_those_of_the_whole_hessian(case):
    model, x, y = case
    names, hessian = hessian_of(model, x, y)
    vector = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    model.eval()
    found = hessian_product(model, x, y, vector)
    assert list(found) == names and torch.allclose(
        flat(found.values()), hessian @ flat(vector.values()), atol=1e-12
    )


def test_the_recursion_is_the_one_of_the_formula(case):
    """Two batches, three epochs: v <- g + (1 - d) v - H v / s with each batch's own Hessian, by
    matrices in NumPy."""
    model, x, y = case
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    g = forget_gradient(model, batches[:1], 9)
    hessians = [hessian_of(model, *b)[1].numpy() for b in batches]
    start = v = flat(g.values()).numpy()
    for step in lissa(model, g, batches, epochs=3, damping=0.05, scale=2):
        for h in hessians:
            v = start + 0.95 * v - h @ v / 2
        assert np.allclose(flat(step.values()).numpy(), v / 2, rtol=1e-10)


def test_it_ends_at_the_damped_inverse(case):
    model, x, y = case
    *_, found = lissa(
        model,
        g := forget_gradient(model, [(x[:3], y[:3])], 9),
        [(x, y)],
        epochs=400,
        damping=0.1,
        scale=10,
    )
    wanted = np.linalg.solve(
        hessian_of(model, x, y)[1].numpy() + np.eye(sum(p.numel() for p in model.parameters())),
        flat(g.values()).numpy(),
    )
    assert np.allclose(flat(found.values()).numpy(), wanted, atol=1e-10)


def test_our_batches_are_shuffled_anew_in_each_epoch_and_by_seed():
    images = load_images("digits")
    model = build_model("resnet20", 10, 1, seed=0)
    reference = images.train[torch.arange(60)].batches(20)
    g = forget_gradient(model, [next(iter(reference))], 60)
    ends = [list(lissa(model, g, reference, epochs=2, seed=s)) for s in (1, 1, 2)]
    assert all(torch.equal(ends[0][k][n], ends[1][k][n]) for k in (0, 1) for n in g)
    assert not torch.equal(ends[0][0]["classifier.weight"], ends[2][0]["classifier.weight"])
    assert count_images(reference) == 60


def test_the_model_is_left_as_it_was(case):
    model, x, y = case
    model.train()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    g = forget_gradient(model, [(x, y)], 9)
    list(lissa(model, g, [(x, y)], epochs=2))
    assert (
        model.training
        and all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
        and all(p.grad is None for p in model.parameters())
    )


class Convex(nn.Module):
    "A linear classifier of the same images: its loss is concave nowhere."

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(x.flatten(1))


def test_divergence_is_refused_long_before_it_overflows(case):
    """200 batches with one Hessian, which multiply v by -1.51 in the steepest direction, by
    -0.91, or by 1.125 in the most concave one."""
    concave, x, y = case
    convex = Convex().double()

    def run(model, **settings):
        return list(
            lissa(model, forget_gradient(model, [(x, y)], 9), [(x, y)] * 200, epochs=1, **settings)
        )

    steepest = np.linalg.eigvalsh(hessian_of(convex, x, y)[1].numpy()).max()
    with pytest.raises(
        FloatingPointError, match=f"in epoch 1: .* above {1.99 * steepest / 2.5:g} or below"
    ):
        run(convex, scale=steepest / 2.5)
    assert run(convex, scale=steepest / 1.9)
    with pytest.raises(
        FloatingPointError, match="in epoch 1: .* or below -0.01. Raise the scale, 1"
    ):
        run(concave, scale=1)


def test_divergence_and_nonsense_are_refused(case):
    model, x, y = case
    g = forget_gradient(model, [(x, y)], 9)
    with pytest.raises(FloatingPointError, match="Raise the scale, 1e-05"):
        list(lissa(model, g, [(x, y)], epochs=500, scale=1e-5))
    for bad in ({"epochs": 0}, {"damping": 1}, {"damping": -0.1}, {"scale": 0}):
        ((name, value),) = bad.items()
        with pytest.raises(ValueError, match=f"`{name}` is {value}: it must be"):
            next(lissa(model, g, [(x, y)], **bad))
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to move"):
        forget_gradient(model, [(x, y)], 9)


class Attends(nn.Module):
    "Attention over the rows of an image, which keeps what it saw, and answers by name."

    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)
        self.seen = None

    def forward(self, x):
        x = x.flatten(1, 2)
        x -= 0.1  # in place
        self.seen, _ = self.attend(x, x, x, need_weights=False)
        return {"logits": self.head(self.seen.mean(1))}


def test_attention_has_a_hessian_and_a_network_that_keeps_activations_is_left_as_it_was(case):
    _, x, y = case
    model = Attends().double()
    twin = copy.deepcopy(model)
    images, state = x.clone(), {n: p.clone() for n, p in model.named_parameters()}
    gradient = forget_gradient(model, [{"x": x, "labels": y}], 9)
    found = hessian_product(model, x, y, gradient)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = F.cross_entropy(twin(x.clone())["logits"], y)
        slopes = torch.autograd.grad(loss, list(twin.parameters()), create_graph=True)
        along = sum((s * v).sum() for s, v in zip(slopes, gradient.values()))
        wanted = torch.autograd.grad(along, list(twin.parameters()))
    for a, b in zip(found.values(), wanted):
        torch.testing.assert_close(a, b)
    assert next(lissa(model, gradient, [(x, y)], epochs=1, scale=100)).keys() == gradient.keys()
    assert model.seen is None and torch.equal(x, images)
    assert all(torch.equal(p, state[n]) and p.grad is None for n, p in model.named_parameters())
    copy.deepcopy(model)
