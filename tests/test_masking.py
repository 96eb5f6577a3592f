"""Selection against a slow oracle: a sorted list of (score, position), one unit at a time."""

from fractions import Fraction

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fisher_unlearn.methods.masking import (
    Pool,
    Stretch,
    candidates,
    draw_mask,
    mask_by_layer,
    masked_rows,
    masked_units,
    quota,
    select_above,
    select_bottom,
    select_in_each,
    select_random,
    select_top,
    zero_,
)
from fisher_unlearn.networks.models import NETWORKS, build_model


def network():
    return nn.Sequential(
        nn.Conv2d(2, 3, 2),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 2, 1, bias=False),
        nn.Flatten(),
        nn.Linear(8, 4),
        nn.Linear(4, 2),
    )


def slow_top(scores, ratio, unit):
    "Every unit as a list of its positions, the best by a stable sort of plain floats."
    units = []
    for name, s in scores.items():
        lead = {"weight": s.ndim, "kernel": 2, "channel": 1}[unit]
        for index in np.ndindex(*s.shape[:lead]):
            units.append((float(np.mean(s[index], dtype=np.float64)), name, index))
    best = sorted(range(len(units)), key=lambda k: (-units[k][0], k))[
        : int(Fraction(str(ratio)) * len(units))
    ]
    masks = {name: np.zeros(s.shape, bool) for name, s in scores.items()}
    for k in best:
        masks[units[k][1]][units[k][2]] = True
    return masks


@given(
    st.sampled_from(["weight", "kernel", "channel"]),
    st.booleans(),
    st.integers(0, 99),
    st.integers(0, 1000),
    st.booleans(),
)
@settings(max_examples=60)
def test_the_top_is_the_slow_top(unit, classifier, percent, seed, ties):
    model, rng = network(), np.random.default_rng(seed)
    pool = candidates(model, unit, classifier)
    # eighths are summed exactly, so equal means are equal in both
    scores = {
        n: (rng.integers(-2, 3, s) if ties else rng.integers(-(2**18), 2**18, s)) / 8
        for n, s in pool.shapes.items()
    }
    ratio = percent / 100
    mask = select_top({n: torch.from_numpy(s) for n, s in scores.items()}, ratio, pool)
    wanted = slow_top(scores, ratio, unit)
    for name, where in wanted.items():
        assert np.array_equal(mask[name].numpy() if name in mask else np.zeros_like(where), where)
        for s in pool.followers.get(name, ()):
            if where.any():
                assert np.array_equal(mask[s.name].numpy(), where.reshape(len(where), -1).any(1))
    assert sum(masked_units(mask, pool).values()) == quota(ratio, len(pool)) and set(mask) <= {
        *pool.shapes,
        "0.bias",
        "5.bias",
        "6.bias",
    }


@given(st.integers(0, 999), st.integers(0, 10**6))
def test_the_quota_is_exact_in_decimal(thousandths, n):
    assert quota(thousandths / 1000, n) == thousandths * n // 1000


def test_the_quota_is_filled_even_if_no_score_is_positive():
    pool = candidates(network())
    scores = {n: -torch.ones(s) for n, s in pool.shapes.items()}
    mask = select_top(scores, 0.5, pool)
    flat = torch.cat(
        [mask.get(n, torch.zeros(s, dtype=torch.bool)).flatten() for n, s in pool.shapes.items()]
    )
    assert (
        flat.sum() == len(pool) // 2 and flat[: len(pool) // 2].all()
    )  # of equal scores the first in module order


def test_the_pool_holds_no_batchnorm_no_bias_and_the_classifier_only_if_asked():
    assert set(candidates(network()).shapes) == {"0.weight", "3.weight", "5.weight"}
    assert set(candidates(network(), classifier=True).shapes) == {
        "0.weight",
        "3.weight",
        "5.weight",
        "6.weight",
    }
    assert set(candidates(network(), classifier_name="5").shapes) == {
        "0.weight",
        "3.weight",
        "6.weight",
    }
    assert (
        len(candidates(network(), "kernel")) == 6 + 6 + 32
        and len(candidates(network(), "channel", True)) == 3 + 2 + 4 + 2
    )
    assert candidates(network(), "channel").followers == {
        "0.weight": (Stretch("0.bias", 3, 0),),
        "3.weight": (),
        "5.weight": (Stretch("5.bias", 4, 0),),
    }
    assert candidates(network(), "channel", reach="kernels").followers == {
        "0.weight": (),
        "3.weight": (),
        "5.weight": (),
    }
    norm = candidates(network(), "channel", reach="norm").followers
    assert [s.name for s in norm["0.weight"]] == [
        "0.bias",
        "1.weight",
        "1.bias",
        "1.running_mean",
        "1.running_var",
    ] and norm["3.weight"] == ()


# Units of the convolutions: kernels and channels; weights of the classifier, and the top 2 % of the
# pools (of MNIST: 4 %), as counted by hand from the layer plans.
COUNTS = [
    ("resnet20", 10, 3, 32_304, 784, 640, 0.02, 658, 646, 15, 15),
    ("resnet20", 10, 1, 32_272, 784, 640, 0.04, 1_316, 1_290, 31, 31),
    ("resnet50", 100, 3, 86_064, 1_904, 6_400, 0.02, 1_849, 1_721, 38, 40),
    ("resnet50", 200, 3, 86_064, 1_904, 12_800, 0.02, 1_977, 1_721, 38, 42),
    ("vgg16", 10, 3, 1_634_496, 4_224, 5_120, 0.02, 32_792, 32_689, 84, 84),
    ("vgg16", 100, 3, 1_634_496, 4_224, 51_200, 0.02, 33_713, 32_689, 84, 86),
    ("vgg16", 10, 1, 1_634_368, 4_224, 5_120, 0.04, 65_579, 65_374, 168, 169),
    ("vgg16", 200, 3, 1_634_496, 4_224, 102_400, 0.02, 34_737, 32_689, 84, 88),
    ("googlenet", 10, 3, 2_687_040, 7_904, 10_240, 0.02, 53_945, 53_740, 158, 158),
    ("googlenet", 100, 3, 2_687_040, 7_904, 102_400, 0.02, 55_788, 53_740, 158, 160),
    ("googlenet", 10, 1, 2_686_656, 7_904, 10_240, 0.04, 107_875, 107_466, 316, 316),
    ("googlenet", 200, 3, 2_687_040, 7_904, 204_800, 0.02, 57_836, 53_740, 158, 162),
    ("densenet", 10, 3, 697_608, 3_840, 3_840, 0.02, 14_028, 13_952, 76, 77),
    ("densenet", 100, 3, 697_608, 3_840, 38_400, 0.02, 14_720, 13_952, 76, 78),
    ("densenet", 10, 1, 697_560, 3_840, 3_840, 0.04, 28_056, 27_902, 153, 154),
    ("densenet", 200, 3, 697_608, 3_840, 76_800, 0.02, 15_488, 13_952, 76, 80),
]


@pytest.mark.parametrize(
    "network, classes, colours, kernels, channels, weights, ratio, top_with, "
    "top_without, top_channels, top_random",
    COUNTS,
)
def test_pools_and_tops_of_the_papers_networks(
    network,
    classes,
    colours,
    kernels,
    channels,
    weights,
    ratio,
    top_with,
    top_without,
    top_channels,
    top_random,
):
    "The table of candidate pools in the protocol of the paper."
    model = build_model(network, classes, colours)
    sizes = {
        (unit, fc): len(candidates(model, unit, fc))
        for unit in ("kernel", "channel")
        for fc in (False, True)
    }
    assert sizes == {
        ("kernel", False): kernels,
        ("kernel", True): kernels + weights,
        ("channel", False): channels,
        ("channel", True): channels + classes,
    }
    assert [
        quota(ratio, sizes[key])
        for key in (("kernel", True), ("kernel", False), ("channel", False), ("channel", True))
    ] == [top_with, top_without, top_channels, top_random]


@pytest.mark.parametrize(
    "network, at_2, at_4",
    [
        ("resnet20", (7, 448), (14, 672)),
        ("resnet50", (17, 1_088), (34, 1_632)),
        ("vgg16", (13, 4_224), (13, 4_224)),
        ("googlenet", (50, 7_456), (60, 7_824)),
        ("densenet", (2, 288), (61, 3_120)),
    ],
)
def test_the_gate_lets_the_layers_of_the_protocol_through(network, at_2, at_4):
    """With scores that are all equal, the rule of the code takes every filter that the gate lets
    through."""
    pool = candidates(build_model(network), "channel")
    scores = {n: torch.zeros(s[0]) for n, s in pool.shapes.items()}
    for ratio, (layers, filters) in ((0.02, at_2), (0.04, at_4)):
        units = masked_units(select_bottom(scores, ratio, pool, gate=True), pool)
        assert (sum(u > 0 for u in units.values()), sum(units.values())) == (layers, filters)


@given(st.integers(1, 99), st.integers(0, 1000), st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=60)
def test_the_bottom_is_what_is_not_above_the_threshold(percent, seed, ties, gate, nan):
    """Against plain Python: the threshold is the smallest of the floor((1 - R) N) highest, where
    NaN is the highest of all."""
    pool, rng = (
        candidates(
            nn.Sequential(nn.Conv2d(1, 30, 1), nn.Conv2d(30, 8, 1), nn.Flatten(), nn.Linear(8, 2)),
            "channel",
        ),
        np.random.default_rng(seed),
    )
    values = rng.integers(0, 5, 38) / 4 if ties else rng.permutation(38) / 4
    if nan:
        values[rng.integers(38)] = np.nan
    kept = 38 * (100 - percent) // 100
    threshold = np.inf if kept == 0 else np.nan if nan else sorted(values)[-kept]
    wanted = [
        not v > threshold and (not gate or n * percent // 100 >= 1)
        for v, n in zip(values, [30] * 30 + [8] * 8)
    ]
    mask = select_bottom(
        {"0.weight": torch.tensor(values[:30]), "1.weight": torch.tensor(values[30:])},
        percent / 100,
        pool,
        gate,
        nan="highest",
    )
    assert [
        bool(mask[n][k].all()) if n in mask else False
        for n, size in (("0.weight", 30), ("1.weight", 8))
        for k in range(size)
    ] == wanted


def test_drawn_units_are_drawn_without_replacement_and_by_seed():
    pool = candidates(network(), "channel", classifier=True)
    drawn = [select_random(0.5, pool, seed) for seed in range(200)]
    assert {sum(masked_units(m, pool).values()) for m in drawn} == {5}
    counts = np.array([[masked_units(m, pool)[n] for n in pool.shapes] for m in drawn]).mean(0) / [
        3,
        2,
        4,
        2,
    ]
    assert abs(counts - 5 / 11).max() < 0.1 and all(
        torch.equal(a, b) for a, b in zip(select_random(0.5, pool, 3).values(), drawn[3].values())
    )


@pytest.mark.parametrize(
    "network_name", ["densenet", "googlenet", "resnet20", "torchvision's DenseNet"]
)
def test_a_channel_takes_its_entries_of_the_batchnorm_with_it(network_name):
    """Where a BatchNorm follows, the masked entries are as many as the channels, at the place
    where it reads them: the masked network reads zero there."""
    appending = (
        network_name not in NETWORKS
    )  # new features come last there, and are read behind all others
    model = (
        torchvision.models.DenseNet(4, (2, 2), 8, num_classes=4).eval()
        if appending
        else build_model(network_name, 4, 1, seed=0).eval()
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias.data.fill_(0.1)
    pool = candidates(model, "channel", reach="norm")
    mask = select_random(0.3, pool, seed=1)
    chosen = masked_units(mask, pool)
    for part in ("running_mean", "running_var"):
        assert (
            sum(int(m.sum()) for n, m in mask.items() if n.endswith(part))
            == sum(chosen.values())
            == quota(0.3, len(pool))
        )
    zero_(model, mask)
    zeros = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(
                lambda m, args, out, name=name: zeros.update(
                    {name: (out == 0).flatten(2).all(2).all(0)}
                )
            )
    model(torch.randn(2, 3 if appending else 1, 32, 32))
    for name, where in mask.items():
        if name.endswith("running_var"):
            assert zeros[name.removesuffix(".running_var")][where].all()
    if appending:
        assert (
            mask["features.denseblock1.denselayer2.norm1.weight"].tolist()
            == [False] * 8
            + mask["features.denseblock1.denselayer1.conv2.weight"].flatten(1).all(1).tolist()
        )


def test_tables_and_pictures_count_what_the_mask_holds(tmp_path):
    model = build_model("resnet20", 10, 1, seed=0)
    mask = select_random(0.02, candidates(model, "kernel", classifier=True), seed=0)
    table = mask_by_layer(mask, model).set_index("layer")
    assert (
        len(table) == 22
        and table.kernels.sum() == quota(0.02, 32_912)
        and table.masked.sum() == sum(int(m.sum()) for m in mask.values())
    )
    figure = draw_mask(mask, model, [3])
    heights = [
        sorted((round(p.get_x() + p.get_width() / 2), p.get_height()) for p in axes.patches)
        for axes in figure.axes
    ]
    assert [h for _, h in heights[0]] == pytest.approx(table.share.tolist())
    assert [h for _, h in heights[1]] == masked_rows(mask, "classifier.weight", 10)
    assert (
        figure.axes[1].get_title()
        == f"class 3: {masked_rows(mask, 'classifier.weight', 10)[3]} of 64"
    )


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.5, float("nan")])
def test_ratios_outside_0_1_are_refused(ratio):
    with pytest.raises(ValueError, match=r"`ratio` is .* in \[0, 1\)"):
        quota(ratio, 10)


def test_scores_that_cannot_be_ranked_are_refused_by_name():
    pool = candidates(network())
    scores = {n: torch.zeros(s) for n, s in pool.shapes.items()}
    for bad, message in [
        ({"3.weight": torch.full((2, 3, 1, 1), float("nan"))}, "`3.weight` are not all numbers"),
        ({"0.weight": torch.zeros(3)}, "must have its shape"),
        ({"0.weight": None}, "must have its shape"),
    ]:
        given_scores = {n: s for n, s in {**scores, **bad}.items() if s is not None}
        with pytest.raises(ValueError, match=message):
            select_top(given_scores, 0.1, pool)
    with pytest.raises(ValueError, match="`unit` is 'layer'"):
        candidates(network(), "layer")
    with pytest.raises(ValueError, match="nothing to mask"):
        candidates(nn.Sequential(nn.Linear(3, 2)))


def test_zeroing_touches_the_masked_entries_and_no_others():
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    mask = {
        "0.weight": torch.rand(3, 2, 2, 2) < 0.5,
        "1.running_mean": torch.tensor([True, False, True]),
    }
    before["1.running_mean"] += 5
    model[1].running_mean += 5
    zero_(model, mask)
    for name, value in model.state_dict().items():
        where = mask.get(name, torch.zeros_like(value, dtype=torch.bool))
        assert (value[where] == 0).all() and torch.equal(value[~where], before[name][~where])
    assert masked_rows(mask, "0.weight", 3) == mask["0.weight"].flatten(1).sum(
        1
    ).tolist() and masked_rows({}, "0.weight", 3) == [0, 0, 0]
    with pytest.raises(ValueError, match="which is no parameter or buffer of the model"):
        zero_(model, {"9.weight": torch.ones(1, dtype=torch.bool)})


def test_a_parameter_without_dimensions_is_one_unit():
    scores = {"a": torch.tensor(3.0), "b": torch.tensor([1.0, 5.0, 2.0])}
    pool = Pool("weight", {name: s.shape for name, s in scores.items()}, {})
    for mask in (select_top(scores, 0.5, pool), select_above(scores, 2.0, pool)):
        assert mask["a"].shape == () and mask["a"] and mask["b"].tolist() == [False, True, False]
    assert select_bottom(scores, 0.25, pool)["b"].tolist() == [True, False, True]  # two remain
    assert {*select_in_each(scores, 0.5, pool)} == {"b"}
    assert sum(int(w.sum()) for w in select_random(0.5, pool, 0).values()) == 2
