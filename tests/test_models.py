"""The layer plans: every parameter count and pool size of the paper's 16 settings."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fisher_unlearn.methods.masking import candidates, quota
from fisher_unlearn.networks.models import (
    NETWORKS,
    build_model,
    check_batch,
    check_batches,
    eval_mode,
    find_classifier,
    min_size,
)

# network, classes, channels: parameters, convolutions, 2-D kernels, channels, weights of the
# classifier
PLANS = {
    ("resnet20", 10, 3): (272_474, 21, 32_304, 784, 640),
    ("resnet20", 10, 1): (272_186, 21, 32_272, 784, 640),
    ("resnet50", 100, 3): (764_404, 51, 86_064, 1_904, 6_400),
    ("resnet50", 200, 3): (770_904, 51, 86_064, 1_904, 12_800),
    ("vgg16", 10, 3): (14_728_266, 13, 1_634_496, 4_224, 5_120),
    ("vgg16", 100, 3): (14_774_436, 13, 1_634_496, 4_224, 51_200),
    ("vgg16", 200, 3): (14_825_736, 13, 1_634_496, 4_224, 102_400),
    ("vgg16", 10, 1): (14_727_114, 13, 1_634_368, 4_224, 5_120),
    ("googlenet", 10, 3): (6_166_250, 64, 2_687_040, 7_904, 10_240),
    ("googlenet", 100, 3): (6_258_500, 64, 2_687_040, 7_904, 102_400),
    ("googlenet", 200, 3): (6_361_000, 64, 2_687_040, 7_904, 204_800),
    ("googlenet", 10, 1): (6_162_794, 64, 2_686_656, 7_904, 10_240),
    ("densenet", 10, 3): (1_000_618, 120, 697_608, 3_840, 3_840),
    ("densenet", 100, 3): (1_035_268, 120, 697_608, 3_840, 38_400),
    ("densenet", 200, 3): (1_073_768, 120, 697_608, 3_840, 76_800),
    ("densenet", 10, 1): (1_000_186, 120, 697_560, 3_840, 3_840),
}
# Units at R = .02 (.04 for grey images, R of MNIST): Fisher pool with and without the classifier,
# activation pool, random pool
TOPS = {
    ("resnet20", 10, 3): (658, 646, 15, 15),
    ("resnet20", 10, 1): (1_316, 1_290, 31, 31),
    ("resnet50", 100, 3): (1_849, 1_721, 38, 40),
    ("resnet50", 200, 3): (1_977, 1_721, 38, 42),
    ("vgg16", 10, 3): (32_792, 32_689, 84, 84),
    ("vgg16", 100, 3): (33_713, 32_689, 84, 86),
    ("vgg16", 200, 3): (34_737, 32_689, 84, 88),
    ("vgg16", 10, 1): (65_579, 65_374, 168, 169),
    ("googlenet", 10, 3): (53_945, 53_740, 158, 158),
    ("googlenet", 100, 3): (55_788, 53_740, 158, 160),
    ("googlenet", 200, 3): (57_836, 53_740, 158, 162),
    ("googlenet", 10, 1): (107_875, 107_466, 316, 316),
    ("densenet", 10, 3): (14_028, 13_952, 76, 77),
    ("densenet", 100, 3): (14_720, 13_952, 76, 78),
    ("densenet", 200, 3): (15_488, 13_952, 76, 80),
    ("densenet", 10, 1): (28_056, 27_902, 153, 154),
}


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: "-".join(map(str, p)))
def test_counts_of_the_plan(plan):
    with torch.device("meta"):
        model = build_model(*plan)
    parameters, convolutions, kernels, channels, classifier = PLANS[plan]
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == convolutions
    ratio = 0.02 if plan[2] == 3 else 0.04
    pools = [
        candidates(model, "kernel", classifier=True),
        candidates(model, "kernel"),
        candidates(model, "channel"),
        candidates(model, "channel", classifier=True),
    ]
    assert [len(p) for p in pools] == [kernels + classifier, kernels, channels, channels + plan[1]]
    assert tuple(quota(ratio, len(p)) for p in pools) == TOPS[plan]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", [8, 13, 32, 64])
def test_any_size_down_to_8_works_or_is_refused(name, size):
    model, x = build_model(name, 7, 2, seed=0), torch.randn(2, 2, size, size)
    if size < min_size(name):
        with pytest.raises(
            ValueError,
            match=f"{name} needs images of at least {min_size(name)}×{min_size(name)} "
            f"pixels, not {size}×{size}",
        ):
            model(x)
    else:
        assert model(x).shape == (2, 7)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_classifier_is_found_and_channels_last_changes_nothing(name):
    model = build_model(name, 10, 3, seed=0).eval()
    assert find_classifier(model) == find_classifier(model, num_classes=10) == "classifier"
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        plain, last = (
            model(x),
            copy.deepcopy(model).to(memory_format=torch.channels_last)(
                x.contiguous(memory_format=torch.channels_last)
            ),
        )
    assert (plain - last).abs().max() <= 1e-4 * plain.abs().max()


def test_the_residual_shortcut_is_a_projection_only_where_the_stride_changes():
    names = [
        n
        for n, m in build_model("resnet20").named_modules()
        if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)
    ]
    assert len(names) == 2 and all("downsample" in n for n in names)


def test_densenet_puts_new_features_first():
    layer = build_model("densenet").features[1][0].eval()
    x = torch.randn(1, 24, 4, 4)
    assert torch.equal(layer(x)[:, 12:], x)


def test_initialisation_of_resnet():
    model = build_model("resnet50", seed=1)
    weights = torch.cat(
        [m.weight.flatten() for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    )
    assert 0 <= weights.min() and weights.max() < 1 and abs(weights.mean() - 0.5) < 0.03
    conv = model.features[1][2][3].conv1.weight
    assert abs(conv.std() * (64 * 9 / 2) ** 0.5 - 1) < 0.05


def test_names_and_numbers_are_checked():
    with pytest.raises(ValueError, match="did you mean 'googlenet'"):
        build_model("googLenet")
    with pytest.raises(
        ValueError, match="`num_classes` is 0: it must be a whole number of 1 or more"
    ):
        build_model("resnet20", num_classes=0)
    with pytest.raises(TypeError, match="normalised"):
        build_model("resnet20")(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="built for images of the shape"):
        build_model("resnet20")(torch.zeros(1, 1, 32, 32))


class Odd(nn.Module):
    "Control flow that can't be traced."

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.a(x) if x.sum() > 0 else self.b(x)


def test_a_classifier_that_cannot_be_told_must_be_named():
    with pytest.raises(ValueError, match='classifier="name"'):
        find_classifier(Odd())
    assert find_classifier(Odd(), "b") == "b"
    with pytest.raises(ValueError, match="unknown classifier 'c'"):
        find_classifier(Odd(), "c")

    class Functional(nn.Module):
        "Its logits come from a parameter outside of any layer."

        def __init__(self):
            super().__init__()
            self.hidden, self.head = nn.Linear(4, 6), nn.Parameter(torch.randn(6, 3))

        def forward(self, x):
            return torch.relu(self.hidden(x)) @ self.head

    with pytest.raises(ValueError, match='classifier="name"'):
        find_classifier(Functional())
    with pytest.raises(ValueError, match="with 5 rows"):
        find_classifier(nn.Sequential(nn.Linear(4, 3)), num_classes=5)


def test_check_batch_names_what_does_not_fit():
    model, x, y = build_model("resnet20", seed=0), torch.zeros(2, 3, 8, 8), torch.tensor([0, 1])
    assert check_batch(model, x, y) == 10
    for bad, kind, message in [
        ((x.to(torch.uint8), y), TypeError, "normalise"),
        ((x, y + 0.5), ValueError, "integer labels"),
        ((x, y[:1]), ValueError, "2 integer labels"),
        ((x, y - 1), ValueError, "labels from -1"),
    ]:
        with pytest.raises(kind, match=message):
            check_batch(model, *bad)
    with pytest.raises(ValueError, match="must return logits"):
        check_batch(nn.Conv2d(3, 4, 1), x, y)
    with pytest.raises(ValueError, match="must return logits"):
        check_batch(nn.Sequential(nn.Conv2d(3, 1, 8), nn.Flatten(0)), x, y)
    with pytest.raises(ValueError, match=r"can't take the inputs of `batches`, \(2, 3, 8, 8\)"):
        check_batch(nn.Linear(5, 2), x, y)
    with pytest.raises(ValueError, match="no parameters"):
        check_batch(nn.Flatten(0), x, y)


def test_eval_mode_puts_modes_back_even_after_an_error():
    model = build_model("resnet20").train()
    model.features[0].eval()
    before = [m.training for m in model.modules()]
    with pytest.raises(RuntimeError), eval_mode(model):
        raise RuntimeError
    assert [m.training for m in model.modules()] == before


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, torch.compile, lambda m: nn.DataParallel(torch.compile(m))]
)
def test_the_classifier_of_a_wrapped_network_is_found(wrap):
    model = wrap(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)))
    name = find_classifier(model)
    assert model.get_submodule(name).out_features == 3
    assert find_classifier(model, name) == find_classifier(model, "2") == name


class Foreign(nn.Module):
    "Anyone's network: what it returns is up to `out`; it keeps what it made in its first pass."

    def __init__(self, out):
        super().__init__()
        self.layer, self.out, self.scale = nn.Linear(4, 5), out, None

    def forward(self, x):
        if self.scale is None:
            self.scale = torch.full((5,), 2.0)
        return self.out(self.layer(x) * self.scale)


@pytest.mark.parametrize(
    "out", [lambda z: (z, z), lambda z: {"logits": z}, lambda z: [z], lambda z: {"out": z, "n": 3}]
)
def test_logits_are_read_from_whatever_a_model_returns(out):
    assert check_batch(Foreign(out), torch.randn(3, 4), np.array([0, 1, 4], "int32")) == 5


def test_a_cache_that_the_check_made_can_be_trained():
    model = Foreign(lambda z: z)
    check_batch(model, torch.randn(3, 4), torch.tensor([0, 1, 4]))
    model(torch.randn(3, 4)).sum().backward()
    assert model.layer.weight.grad is not None


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (lambda z: z[:, :1], "one column of logits"),
        (lambda z: (z[:, :2], z), "which of them are the logits isn't clear"),
        (lambda z: z.argmax(1), "must return logits of the shape"),
        (lambda z: z.to(torch.complex64), "not torch.complex64"),
        (lambda z: z.missing, "can't take the inputs of `forget`.*no attribute 'missing'"),
        (lambda z, mask: z, "missing 1 required positional argument"),
    ],
)
def test_what_a_model_must_not_return_is_one_sentence(out, message):
    with pytest.raises(ValueError, match=message) as error:
        check_batch(Foreign(out), torch.randn(3, 4), torch.tensor([0, 1, 4]), "forget")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_probabilities_in_place_of_logits_are_said(activation):
    model = Foreign(lambda z: z.sigmoid() if activation == "sigmoid" else z.softmax(1))
    with pytest.warns(
        UserWarning,
        match=f"look like those of a {activation}.*leave the model's last activation out",
    ):
        check_batch(model, torch.randn(8, 4), torch.zeros(8))


def test_batches_of_any_kind_are_checked_and_empty_ones_passed_over():
    model, x = Foreign(lambda z: z), torch.randn(3, 4)
    for batches in (
        [{"x": x, "y": [0, 1, 2]}],
        [(x[:0], []), (x, [0, 1, 2], "meta")],
        [(x.numpy(), np.array([[0.0], [1.0], [2.0]]))],
    ):
        assert check_batches(model, batches, "forget") == 5
    for batches in ([(x[:0], [])], [(x, [0, 1, float("nan")])], [(x, [0, 1, 5])]):
        with pytest.raises(ValueError, match="`forget`"):
            check_batches(model, batches, "forget")
