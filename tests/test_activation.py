"""Channel scores against loops in float64, an image and a channel at a time, and the modules
taken in the order of their registration."""

import copy

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from fisher_unlearn.scores.activation import (
    activation_scores,
    find_convolutions,
    mean_activations,
    read_channels,
)
from fisher_unlearn.scores.graph import find_readers
from fisher_unlearn.networks.models import NETWORKS, build_model, min_size
from fisher_unlearn.scores.tfidf import class_activations, tfidf_scores


def made(network, n=7, classes=3, seed=0):
    g, size = torch.Generator().manual_seed(seed), min_size(network)
    model = build_model(network, classes, 1, seed=seed)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):  # statistics that do something
            m.running_mean.data, m.running_var.data = (
                torch.randn(m.num_features, generator=g) / 5,
                torch.rand(m.num_features, generator=g) + 0.5,
            )
    return (
        model,
        torch.randn(n, 1, size, size, generator=g),
        torch.randint(classes, (n,), generator=g),
    )


def slow_table(model, inputs, after_norm):
    """{convolution: list of (channels,) in float64} for each image: read at the next BatchNorm
    in module order, or at the convolution itself."""
    model = copy.deepcopy(model).double().eval()
    order = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
    table, seen = {}, {}
    for _, m in order:
        m.register_forward_hook(lambda m, args, out: seen.update({m: out[0].detach().clone()}))
    for x in inputs:
        model(x[None].double())
        for k, (name, m) in enumerate(order):
            if not isinstance(m, nn.Conv2d):
                continue
            place = (
                next(n for _, n in order[k:] if isinstance(n, nn.BatchNorm2d)) if after_norm else m
            )
            maps = seen[place].numpy()[
                : m.out_channels
            ]  # new features come first where several are concatenated
            table.setdefault(name, []).append(np.maximum(maps, 0).mean((1, 2)))
    return table


def near(a, b, tolerance=1e-5):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape and np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-12)


@pytest.mark.parametrize("network", NETWORKS)
def test_channels_are_read_after_the_next_batchnorm_in_every_network(network):
    model, inputs, _ = made(network, n=2)
    slow, fast = slow_table(model, inputs, True), read_channels(model, inputs, find_readers(model))
    assert set(fast) == set(slow) == set(find_convolutions(model))
    for layer in slow:
        near(fast[layer], np.array(slow[layer]))


def test_channels_are_read_where_later_features_are_appended():
    """In torchvision's DenseNet the new features come last: the next BatchNorm reads them behind
    all that were there before."""
    torch.manual_seed(0)
    model, inputs, wanted = (
        torchvision.models.DenseNet(4, (2, 2), 8, num_classes=3).eval(),
        torch.randn(2, 3, 32, 32),
        {},
    )
    norms = {m: n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for m in norms:
        (
            m.running_mean.data.normal_(),
            m.running_var.data.uniform_(0.5, 1.5),
            m.weight.data.normal_(),
            m.bias.data.normal_(),
        )
        m.register_forward_hook(
            lambda m, args, out: wanted.update({norms[m]: out.clamp_min(0).mean((2, 3)).detach()})
        )
    with torch.no_grad():
        model(inputs)
    found = read_channels(model, inputs, find_readers(model))
    after = {
        "denseblock1.denselayer1": "denseblock1.denselayer2.norm1",
        "denseblock1.denselayer2": "transition1.norm",
        "denseblock2.denselayer1": "denseblock2.denselayer2.norm1",
        "denseblock2.denselayer2": "norm5",
    }
    for layer, norm in after.items():
        near(found[f"features.{layer}.conv1"], wanted[f"features.{layer}.norm2"])
        near(found[f"features.{layer}.conv2"], wanted[f"features.{norm}"][:, -4:])
    near(found["features.conv0"], wanted["features.norm0"])
    near(found["features.transition1.conv"], wanted["features.denseblock2.denselayer1.norm1"])


@pytest.mark.parametrize("per", ["sample", "batch"])
def test_scores_are_differences_of_means(per):
    """Over images, or over batches of 128 whatever the loader gives: 7 and 4 images are one
    batch each."""
    model, inputs, labels = made("resnet20", n=11)
    loader = lambda part: list(zip(inputs[part].split(3), labels[part].split(3)))
    forget, remain = slice(0, 4), slice(4, 11)
    table = slow_table(model, inputs, True)
    scores = activation_scores(model, loader(forget), loader(remain), per)
    for layer, rows in table.items():
        f, r = np.sum(rows[forget], 0), np.sum(rows[remain], 0)
        near(scores[f"{layer}.weight"], f / 4 - r / 7 if per == "sample" else f - r)
    alone = activation_scores(model, loader(forget), None, per)
    for layer, rows in table.items():
        near(alone[f"{layer}.weight"], np.sum(rows[forget], 0) / (4 if per == "sample" else 1))


def test_reading_leaves_no_trace():
    model, inputs, labels = made("densenet")
    model.train()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    activation_scores(model, [(inputs, labels)], [(inputs, labels)])
    assert model.training and not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_equal_sets_have_no_score():
    model, inputs, labels = made("vgg16")
    assert all(
        (s == 0).all()
        for s in activation_scores(model, [(inputs, labels)], [(inputs, labels)]).values()
    )


def slow_tfidf(rows, labels, classes, num_classes):
    mean = np.zeros((len(rows[0]), num_classes))
    for n in range(num_classes):
        of_class = [r for r, y in zip(rows, labels) if y == n]
        if of_class:
            mean[:, n] = np.mean(of_class, 0)
    total = sum(mean[c, f] for c in range(len(mean)) for f in classes)
    return [
        sum(mean[c, f] for f in classes)
        / total
        * np.log(
            num_classes / (1 + sum(mean[c, n] >= np.mean(mean[c]) for n in range(num_classes)))
        )
        for c in range(len(mean))
    ]


@pytest.mark.parametrize("batches, read", [(1, 4), (2, 8), (0, 11)])
@pytest.mark.parametrize("classes", [[0], [1, 2]])
def test_tfidf_is_its_formula(batches, read, classes):
    model, inputs, labels = made("resnet20", n=11, classes=4)
    labels[:] = torch.tensor([0, 1, 2, 1, 0, 0, 1, 2, 0, 1, 2])  # class 3 never occurs
    table = slow_table(model, inputs[:read], False)
    scores = tfidf_scores(model, list(zip(inputs.split(4), labels.split(4))), classes, batches)
    assert set(scores) == {f"{layer}.weight" for layer in table}
    for layer, rows in table.items():
        near(scores[f"{layer}.weight"], slow_tfidf(rows, labels[:read].tolist(), classes, 4))


def test_a_class_without_images_has_activation_0_and_a_dead_layer_no_score():
    model, inputs, labels = made("resnet20", n=4)
    labels[:] = 0
    means = class_activations(model, [(inputs, labels)])
    assert all((m[:, 1:] == 0).all() and (m[:, 0] > 0).any() for m in means.values())
    model.features[0][0].weight.data.zero_()
    assert tfidf_scores(model, [(inputs, labels)], [0])["features.0.0.weight"].isnan().all()


def test_what_cannot_be_scored_is_refused():
    model, inputs, labels = made("resnet20")
    loader, linear = [(inputs, labels)], nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    for bad, message in [
        (lambda: activation_scores(linear, loader, loader), "has no convolution"),
        (lambda: tfidf_scores(linear, loader, [0]), "has no convolution"),
        (lambda: tfidf_scores(model, loader, [3]), "do not all exist"),
        (lambda: tfidf_scores(model, loader, [0], -1), "`batches` is -1"),
        (lambda: tfidf_scores(model, loader, []), "`classes` is empty"),
        (lambda: activation_scores(model, loader, []), "`remain` is empty"),
        (lambda: activation_scores(model, [(inputs, labels + 5)], None), "`forget` has labels"),
    ]:
        with pytest.raises(ValueError, match=message):
            bad()


def test_means_of_user_batches_count_images_not_batches():
    model, inputs, labels = made("resnet20", n=9)
    readers = find_readers(model)
    a, b = (
        mean_activations(model, list(zip(inputs.split(size), labels.split(size))), readers)
        for size in (2, 9)
    )
    for layer in a:
        near(a[layer], b[layer], 1e-6)


class Keeps(nn.Module):
    "A network that counts its batches, keeps what it saw, and normalises its input in place."

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)
        self.seen, self.count = [], 0
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x):
        x.sub_(0.5)
        self.count += 1
        self.total = self.total + x.sum()
        self.seen.append(self.conv(x))
        return self.head(self.seen[-1].mean((2, 3)))


def test_reading_leaves_model_and_images_as_they_were():
    model = Keeps()
    model.conv.out_channels = 7  # what was said when it was made does not hold any more
    inputs, labels = torch.randn(5, 1, 6, 6), torch.arange(5) % 3
    before, total = inputs.clone(), model.total
    with torch.no_grad():
        wanted = model.conv(inputs - 0.5).relu().mean((0, 2, 3))
    batches = [
        {"image": inputs[:3], "label": labels[:3].float()},
        {"image": inputs[3:], "label": labels[3:].float()},
    ]
    near(activation_scores(model, batches, None)["conv.weight"], wanted, 1e-6)
    assert tfidf_scores(model, batches, [0])["conv.weight"].shape == (4,)
    assert read_channels(model, inputs, find_readers(model, inputs))["conv"].shape == (5, 4)
    assert (
        model.seen == []
        and model.count == 0
        and model.total is total
        and torch.equal(inputs, before)
    )
