"""Which BatchNorm reads a layer's channels, against what happens in the network when a channel
is moved."""

import pytest
import torch
import torchvision
from torch import nn

from fisher_unlearn.scores.graph import LAYERS, Reader, _from_hooks, find_readers
from fisher_unlearn.networks.models import NETWORKS, build_model, min_size


class Preactivated(nn.Module):
    "BatchNorm, ReLU, convolution, then the sum: the next BatchNorm reads the sum."

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)
        self.norm1, self.conv1, self.norm2, self.conv2, self.norm3 = (
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.BatchNorm2d(4),
        )

    def forward(self, x):
        x = self.stem(x)
        y = self.conv2(self.norm2(self.conv1(self.norm1(x).relu())).relu())
        return self.head(self.norm3(x + y).relu().mean((2, 3)))


class ReluFirst(nn.Module):
    """The ReLU comes before the BatchNorm, so that the BatchNorm reads something else; in place,
    the tensor stays the same object."""

    def __init__(self, inplace=True, traceable=True):
        super().__init__()
        self.conv, self.relu, self.norm, self.head, self.traceable = (
            nn.Conv2d(1, 4, 3),
            nn.ReLU(inplace),
            nn.BatchNorm2d(4),
            nn.Linear(4, 3),
            traceable,
        )

    def forward(self, x):
        if not self.traceable and x.sum() == 0:
            return x
        return self.head(self.norm(self.relu(self.conv(x))).mean((2, 3)))


def moved_first(model, inputs, layer, channel):
    """The BatchNorm, and its channel, whose input first rises by exactly 1 everywhere if one
    channel of a layer is raised by 1."""
    model, reads = model.eval().double(), []
    norms = {
        m: n for n, m in model.named_modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))
    }
    hooks = [
        m.register_forward_pre_hook(lambda m, args: reads.append((norms[m], args[0].clone())))
        for m in norms
    ]

    def raised(module, args, output):
        out = output.clone()
        out[:, channel] += 1
        return out

    with torch.no_grad():
        model(inputs.double())
        plain, reads[:] = list(reads), []
        hook = model.get_submodule(layer).register_forward_hook(raised)
        model(inputs.double())
    for h in (*hooks, hook):
        h.remove()
    for (name, before), (_, after) in zip(plain, reads):
        rise = (after - before).transpose(0, 1).flatten(1)
        if not torch.equal(rise, torch.zeros_like(rise)):
            where = [
                c
                for c in range(len(rise))
                if torch.allclose(rise[c], torch.ones_like(rise[c]), atol=1e-9)
            ]
            return (
                (name, where[0])
                if len(where) == 1 and (rise.abs() > 1e-9).any(1).sum() == 1
                else None
            )
    return None


CASES = {
    **{
        name: (lambda n=name: build_model(n, 4, 1, seed=0), (2, 1, min_size(name), min_size(name)))
        for name in NETWORKS
    },
    "torchvision's DenseNet": (
        lambda: torchvision.models.DenseNet(4, (2, 2), 8, num_classes=3),
        (2, 3, 32, 32),
    ),
    "bottlenecks": (
        lambda: torchvision.models.resnet50(weights=None, num_classes=3),
        (2, 3, 32, 32),
    ),
    "mobilenet": (
        lambda: torchvision.models.mobilenet_v3_small(weights=None, num_classes=3),
        (2, 3, 32, 32),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_reader_is_the_batchnorm_that_sees_the_channel_move(name):
    build, shape = CASES[name]
    model, inputs = build(), torch.randn(shape, generator=torch.Generator().manual_seed(0))
    readers = find_readers(model)
    layers = [n for n, m in model.named_modules() if isinstance(m, LAYERS)]
    assert list(readers) == layers
    for layer in layers[:: max(1, len(layers) // 12)]:  # a dozen of each network
        reader, channel = readers[layer], model.get_submodule(layer).weight.shape[0] - 1
        if isinstance(model.get_submodule(layer), nn.Linear):
            assert reader == Reader()
        elif reader.norm is not None:
            assert moved_first(model, inputs, layer, channel) == (
                reader.norm,
                reader.start + channel,
            )
    convolutions = [n for n in layers if isinstance(model.get_submodule(n), nn.Conv2d)]
    squeezing = [
        n for n in convolutions if ".fc" in n
    ]  # those of MobileNet's squeeze-and-excitation have no BatchNorm
    assert [n for n in convolutions if readers[n].norm is None] == squeezing


def test_a_sum_ends_the_search():
    assert {n: r.norm for n, r in find_readers(Preactivated()).items()} == {
        "stem": "norm1",
        "conv1": "norm2",
        "conv2": None,
        "head": None,
    }


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("traceable", [True, False])
def test_a_relu_in_between_ends_the_search(inplace, traceable):
    readers = find_readers(ReluFirst(inplace, traceable), torch.randn(2, 1, 8, 8))
    assert readers == {"conv": Reader(), "head": Reader()}


@pytest.mark.parametrize("name", ["resnet20", "vgg16", "googlenet"])
def test_hooks_find_what_the_graph_shows(name):
    model = build_model(name, 4, 1, seed=0)
    found = _from_hooks(model, torch.randn(2, 1, min_size(name), min_size(name)))
    assert found == find_readers(model)
    assert not any(m._forward_hooks for m in model.modules()) and model.training


def test_hooks_do_not_guess_what_they_cannot_see():
    "The concatenation of a DenseNet is a function, which hooks don't see."
    with pytest.raises(
        ValueError, match="what follows the layer `features.1.0.layers.1.2` can't be told"
    ):
        _from_hooks(build_model("densenet", 4, 1, seed=0), torch.randn(2, 1, 8, 8))


def test_layers_that_run_twice_are_refused():
    class Twice(nn.Module):
        def __init__(self, traceable):
            super().__init__()
            self.conv, self.norm, self.head, self.traceable = (
                nn.Conv2d(2, 2, 1),
                nn.BatchNorm2d(2),
                nn.Linear(2, 3),
                traceable,
            )

        def forward(self, x):
            if not self.traceable and x.sum() == 0:
                return x
            return self.head(self.norm(self.conv(self.conv(x))).mean((2, 3)))

    for traceable in (True, False):
        with pytest.raises(ValueError, match="the layer `conv` runs 2 times"):
            find_readers(Twice(traceable), torch.randn(2, 2, 4, 4))


def test_channels_behind_unknown_widths_are_not_guessed():
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(5)

        def forward(self, x):
            return self.norm(torch.cat([x, self.conv(x)], 1)).mean((2, 3))

    with pytest.raises(ValueError, match="can't be read from the graph"):
        find_readers(Beside())


class Assigns(nn.Module):
    "A forward pass that assigns to a buffer, and a concatenation before the BatchNorm."

    def __init__(self):
        super().__init__()
        self.one, self.two, self.norm, self.head = (
            nn.Conv2d(1, 2, 3),
            nn.Conv2d(1, 3, 3),
            nn.BatchNorm2d(5),
            nn.Linear(5, 3),
        )
        self.register_buffer("last", torch.zeros(5))

    def forward(self, x):
        x = self.norm(torch.cat([self.one(x), self.two(x)], 1)).mean((2, 3))
        self.last = x.mean(0)
        return self.head(x)


def test_tracing_leaves_buffers_alone_and_reads_widths_from_tensors():
    model = Assigns()
    last, model.one.out_channels, model.norm.num_features = model.last, 9, 9
    assert find_readers(model) == {
        "one": Reader("norm", 0),
        "two": Reader("norm", 2),
        "head": Reader(),
    }
    assert model.last is last and model.training
