"""Forgetting in other people's networks: names, ties, pruned and parametrised layers, wrappers,
and options that nobody reads."""

import copy
import warnings
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from fisher_unlearn.images.arguments import Positive, option
from fisher_unlearn.lab.settings import RunSettings, resolve, run_key, training_key
from fisher_unlearn.lab.report import read_kept
from fisher_unlearn.methods.base import Method
from fisher_unlearn.methods.masking import (
    candidates,
    mask_by_layer,
    select_bottom,
    select_random,
    select_top,
    zero_,
)
from fisher_unlearn.networks.schedule import Schedule
from fisher_unlearn.networks.train import TrainSettings
from fisher_unlearn.methods.unlearn import METHODS, unlearn

FIGURES = Path(__file__).parents[1] / "figures"
G = torch.Generator().manual_seed(0)
X, Y = torch.randn(8, 6, generator=G), torch.tensor([0] * 4 + [1, 2, 3, 4])
FORGET, REMAIN = [(X[:4], Y[:4])], [(X[4:], Y[4:])]
TUNE = TrainSettings(Schedule(lr=0.1, epochs=2, drops=()), select="last")


def dense():
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 5))


def tied(share="parameter"):
    model = dense()
    if share == "parameter":
        model[2].weight = model[0].weight
    if share == "memory":
        model[2].weight.data = model[0].weight.data
    if share == "module":
        model[2] = model[0]
    return model


def forget(model, method="fisher_mask", **options):
    return unlearn(model, FORGET, REMAIN, method=method, progress="none", **options)


# Ties and aliases


@pytest.mark.parametrize("share", ["parameter", "memory", "module"])
def test_a_shared_weight_is_in_the_pool_once_and_held_under_all_its_names(share):
    model = tied(share)
    assert list(candidates(model).shapes) == ["0.weight"]
    assert len(candidates(model)) == 36
    result = forget(model, ratio=0.5, hard=True, fine_tune=TUNE)
    where = result.mask["0.weight"]
    assert int(where.sum()) == 18
    assert (result.model[0].weight[where] == 0).all() and (result.model[2].weight[where] == 0).all()
    assert result.changed.name.tolist() == ["0.weight"]
    assert "masked 18" in result.note


def test_a_weight_that_the_classifier_shares_is_spared_with_it():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[4].weight = model[0].weight
    assert list(candidates(model, classifier_name="4").shapes) == ["2.weight"]
    assert list(candidates(model, classifier=True).shapes) == ["0.weight", "2.weight"]


def test_channels_of_a_shared_weight_take_the_biases_of_all_its_layers():
    pool = candidates(tied(), "channel")
    assert [s.name for s in pool.followers["0.weight"]] == ["0.bias", "2.bias"]


def test_a_parameter_of_the_root_that_a_layer_shares_has_one_name():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 6))
            self.a, self.head = nn.Linear(6, 6), nn.Linear(6, 5)
            self.a.weight = self.w

        def forward(self, x):
            return self.head(self.a(x @ self.w))

    assert list(candidates(Root()).shapes) == ["w"]
    assert forget(Root(), ratio=0.5).mask["w"].sum() == 18


# Pruned and parametrised layers


def test_a_pruned_layer_is_in_the_pool_under_its_factor():
    model = dense()
    prune.l1_unstructured(model[0], "weight", 0.5)
    result = forget(model, ratio=0.25, hard=True, fine_tune=TUNE)
    assert set(result.mask) <= {"0.weight_orig", "2.weight"}
    assert sum(int(m.sum()) for m in result.mask.values()) == 18
    for name, where in result.mask.items():
        assert (result.model.state_dict()[name][where] == 0).all()
    assert int((result.model[0].weight == 0).sum()) >= 18
    assert mask_by_layer(result.mask, model).masked.sum() == 18


@pytest.mark.parametrize("method", ["random_mask", "mask_classifier", "fisher_noise", "finetune"])
def test_every_method_works_on_pruned_networks(method):
    model = dense()
    for layer in (model[0], model[4]):
        prune.l1_unstructured(layer, "weight", 0.5)
    result = forget(model, method, fine_tune=TUNE)
    if method == "mask_classifier":
        assert set(result.mask) == {"4.weight_orig", "4.bias"}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "change",
    [
        weight_norm,
        spectral_norm,
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
    ],
)
def test_a_parametrised_layer_is_left_out_with_a_warning(change):
    model = dense()
    change(model[0])
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.warns(
        UserWarning,
        match="the weights of '0' are computed by a parametrisation, .*left out of the pool",
    ):
        pool = candidates(model)
    assert list(pool.shapes) == ["2.weight"]
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    with pytest.warns(UserWarning, match="left out"):
        result = forget(model, ratio=0.5)
    assert int(result.mask["2.weight"].sum()) == 18
    change(model[2])
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(ValueError, match="nothing to mask"),
    ):
        candidates(model)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_rows_of_a_parametrised_classifier_are_refused_in_a_sentence():
    model = dense()
    parametrizations.weight_norm(model[4])
    with pytest.raises(
        ValueError, match="the weight of the classifier '4' is computed by a parametrisation"
    ):
        forget(model, "mask_classifier")
    with pytest.raises(ValueError, match="no row of it can start from 0"):
        forget(model, "fisher_noise", noise_row=True)
    assert len(forget(model, "fisher_noise", noise_row=False).changed)


# Wrappers


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
@pytest.mark.parametrize("method", ["fisher_mask", "mask_classifier", "random_mask"])
def test_wrappers_are_seen_through(wrap, method):
    model = dense()
    plain, found = forget(model, method), forget(wrap(model), method)
    assert set(plain.mask) == set(found.mask) and all(
        torch.equal(m, found.mask[n]) for n, m in plain.mask.items()
    )
    wrapped = zero_(wrap(copy.deepcopy(model)), found.mask)
    assert all(
        torch.equal(a, b)
        for a, b in zip(wrapped.state_dict().values(), found.model.state_dict().values())
    )


def test_the_classifier_of_a_wrapped_network_is_named_either_way():
    masks = [
        forget(nn.DataParallel(dense()), "mask_classifier", classifier=name).mask
        for name in ("4", "module.4")
    ]
    assert set(masks[0]) == set(masks[1]) == {"4.weight", "4.bias"}


# Late and raw


def test_bfloat16_networks_forget():
    half = lambda part: [(x.bfloat16(), y) for x, y in part]
    result = unlearn(
        dense().bfloat16(),
        half(FORGET),
        half(REMAIN),
        ratio=0.25,
        fine_tune=TUNE,
        hard=True,
        progress="none",
    )
    assert sum(int(m.sum()) for m in result.mask.values()) == 18


def test_states_beyond_tensors_and_expanded_buffers_do_not_disturb(tmp_path):
    class Odd(nn.Sequential):
        def __init__(self):
            super().__init__(*dense())
            self.register_buffer("mean", torch.zeros(1).expand(4))

        def get_extra_state(self):
            return {"made": "by hand"}

        def set_extra_state(self, state):
            pass

    result = forget(
        Odd(),
        ratio=0.25,
        fine_tune=TUNE,
        checkpoint=tmp_path / "p.safetensors",
        evaluate={"forget": FORGET, "remain": REMAIN},
    )
    assert len(result.history) == 3


@pytest.mark.parametrize(
    "kind",
    [
        lambda x, y: {"x": x, "y": y},
        lambda x, y: (x, y.int(), list(range(len(y)))),
        lambda x, y: (x, y.float()),
        lambda x, y: (x.numpy(), y.numpy()),
    ],
)
@pytest.mark.parametrize("method", ["mask_classifier", "random_mask", "retrain"])
def test_batches_of_any_kind_are_served(kind, method):
    batches = [[kind(*pair) for pair in part] for part in (FORGET, REMAIN)]
    more = {"build": dense} if method == "retrain" else {}
    result = unlearn(dense(), *batches, method=method, fine_tune=TUNE, progress="none", **more)
    assert len(result.history) == 3


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (dict(fine_tune=5), TypeError, "`fine_tune` is 5: it must be a TrainSettings or None"),
        (dict(seed=2**70), ValueError, "`seed` is"),
        (dict(progress="x"), ValueError, "`progress` is 'x'"),
        (dict(classes=()), ValueError, r"`classes` is \(\)"),
        (dict(hard="x"), TypeError, "`hard` is 'x'"),
        (dict(ratio=float("nan")), ValueError, "`ratio` is nan"),
        (dict(remain_weight=float("nan")), ValueError, "`remain_weight` is nan"),
        (dict(remain_weight=-1.0), ValueError, "`remain_weight` is -1"),
        (dict(num_classes=5), ValueError, "unknown option of `fisher_mask` 'num_classes'"),
        (dict(watch=print), ValueError, "unknown option of `fisher_mask` 'watch'"),
        (
            dict(noise_alpha=1.0),
            ValueError,
            "unknown option of `fisher_mask` 'noise_alpha': .*Known: ratio",
        ),
        (
            dict(method="finetune", ratio=0.1),
            ValueError,
            "`finetune` has no options: leave `ratio` out",
        ),
        (dict(method="fisher_noise", noise_alpha=float("nan")), ValueError, "`noise_alpha` is nan"),
        (dict(method="fisher_noise", noise_exponent=-1.0), ValueError, "`noise_exponent` is -1"),
        (dict(method="fisher_noise", noise_clamp=0.0), ValueError, "`noise_clamp` is 0"),
        (dict(method="influence", lissa_epochs=0), ValueError, "`lissa_epochs` is 0"),
        (dict(method="influence", lissa_scale=-1.0), ValueError, "`lissa_scale` is -1"),
        (dict(method="influence", lissa_damping=1.0), ValueError, "`lissa_damping` is 1"),
        (dict(method=3), TypeError, "`method` is 3"),
        (dict(forget=[(X[:0], Y[:0])]), ValueError, "`forget` is empty"),
    ],
)
def test_calls_that_make_no_sense_are_one_sentence(call, kind, message):
    with pytest.raises(kind, match=message) as error:
        unlearn(**{"model": dense(), "forget": FORGET, "remain": REMAIN, "progress": "none"} | call)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", METHODS)
def test_a_network_of_which_all_is_frozen_is_refused_before_anything_is_read(method, monkeypatch):
    monkeypatch.setattr("fisher_unlearn.methods.unlearn.overlap", lambda *_: pytest.fail("read"))
    frozen, ways = dense().requires_grad_(False), {"build": dense, "progress": "none"}
    ways |= {"reference": [*FORGET, *REMAIN], "held_out": FORGET, "fine_tune": TUNE}
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient") as error:
        unlearn(frozen, FORGET, REMAIN, method=method, **ways)
    assert "\n" not in str(error.value)


def test_a_mask_needs_no_gradient():
    mask = {"2.weight": torch.zeros(6, 6, dtype=torch.bool)}
    mask["2.weight"][0] = True
    frozen = dense().requires_grad_(False)
    row = unlearn(frozen, FORGET, REMAIN, mask=mask, progress="none").model[2].weight[0]
    assert torch.equal(row, torch.zeros(6))


class Table(nn.Module):
    "Words, whose table gives sparse gradients or whole ones."

    def __init__(self, sparse):
        super().__init__()
        self.words, self.head = nn.Embedding(4, 6, sparse=sparse), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.words(x).mean(1)))


def table(sparse, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Table(sparse)


TRAINING = [name for name, kind in METHODS.items() if kind.objective is not Method.objective]


OF_IMAGES = ("msg", "ct", "unsir")


@pytest.mark.parametrize("method", ["finetune", *(m for m in TRAINING if m not in OF_IMAGES)])
def test_a_table_with_sparse_gradients_is_trained_as_one_with_whole_ones(method):
    x, y = torch.arange(36).reshape(12, 3) % 4, torch.arange(12) % 3
    sets, ends = ([(x[y == 0], y[y == 0])], [(x[y > 0], y[y > 0])]), []
    few = {"sfron_steps": 3, "own_epochs": 1, "last_k": 1}
    known = {f.name for f in fields(METHODS[method])}
    made = replace(METHODS[method](), **{n: v for n, v in few.items() if n in known})
    for sparse in (True, False):
        ways = {"build": partial(table, sparse, 1), "held_out": [(3 - x, y)], "fine_tune": TUNE}
        ways |= {"check_sets": False, "progress": "none"}
        ends.append(unlearn(table(sparse, 0), *sets, method=made, **ways))
    one, other = (end.model.state_dict() for end in ends)
    assert all(torch.allclose(t, other[n], 1e-4, 1e-5) for n, t in one.items())
    assert ends[0].model.words.sparse and not ends[1].model.words.sparse


def test_a_single_image_to_fine_tune_on_is_said_before_anything_is_scored(monkeypatch):
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 5))
    monkeypatch.setattr(METHODS["fisher_mask"], "__call__", lambda *_: pytest.fail("scored"))
    with pytest.raises(ValueError, match="`remain` begins with a batch of a single image"):
        unlearn(model, FORGET, [(X[4:5], Y[4:5])], fine_tune=TUNE, progress="none")
    monkeypatch.undo()
    batches = [(X[4:7], Y[4:7]), (X[7:], Y[7:])]
    assert (
        len(unlearn(model, FORGET, batches, fine_tune=TUNE, progress="none", ratio=0.1).history)
        == 3
    )


# Retraining


def test_a_network_that_is_not_fresh_is_refused():
    trained = forget(
        dense(),
        "finetune",
        fine_tune=TrainSettings(Schedule(lr=0.5, epochs=200, drops=()), select="last"),
    ).model
    for build in (
        lambda: trained,
        lambda: nn.DataParallel(trained),
        lambda: copy.deepcopy(trained),
    ):
        with pytest.raises(ValueError, match="`build` returns the .*trained model"):
            forget(trained, "retrain", build=build)
    untrained = dense()
    with pytest.raises(ValueError, match="`build` returns the trained model itself"):
        forget(untrained, "retrain", build=lambda: untrained)

    def seen_otherwise():
        fresh = dense()
        fresh[0].weight.data = untrained[0].weight.data.t()
        return fresh

    with pytest.raises(ValueError, match="or its parameters"):
        forget(untrained, "retrain", build=seen_otherwise)


@pytest.mark.parametrize(
    ("build", "kind", "message"),
    [
        (
            lambda: nn.Linear(6, 5),
            ValueError,
            "`build` makes another network than the model: they differ in '0.weight'",
        ),
        (lambda: None, TypeError, "`build` returns a NoneType"),
    ],
)
def test_what_build_makes_is_checked(build, kind, message):
    with pytest.raises(kind, match=message.replace("'0.weight'", "`0.weight`")):
        forget(dense(), "retrain", build=build)


def test_one_seed_retrains_one_network_whatever_build_draws():
    import random

    import numpy as np

    def build():
        model = dense()
        model[0].bias.data += random.random() + np.random.rand()
        return model

    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    start = dense()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    runs = [
        forget(start, "retrain", build=build, fine_tune=TUNE, seed=seed).model for seed in (3, 3, 4)
    ]
    assert all(
        torch.equal(a, b)
        for a, b in zip(runs[0].state_dict().values(), runs[1].state_dict().values())
    )
    assert not torch.equal(runs[0][0].weight, runs[2][0].weight)
    assert (
        torch.equal(torch.get_rng_state(), states[0])
        and random.getstate() == states[1]
        and np.random.get_state()[1].tolist() == states[2]
    )


# Keys


def changed(name, value):
    "Another value of an option."
    words = {
        "unit": "kernel",
        "reach": "norm",
        "fisher_labels": "expected",
        "fisher_per": "batch",
        "activation_per": "batch",
        "tfidf_direction": "lowest",
        "remain_weight": 3.0,
    }
    words |= {"salun_freeze": "gradients", "kick_where": "along", "kick_length": 2.0}
    words |= {"kick_seed": 3}
    other = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v / 2 or 0.5}
    words["fisher_per"] = "sample" if value == "batch" else "batch"
    return words[name] if name in words else other[type(value)](value)


@pytest.mark.parametrize("method", METHODS)
def test_every_option_of_a_method_changes_its_key(method):
    masks = ("random_mask", "fisher_mask", "kick")  # whose reach is that of channels
    usual = METHODS[method](**({"unit": "channel"} if method in masks else {}))
    for field in fields(usual):
        if (method, field.name) == ("kick", "hard"):
            continue  # which it refuses
        if field.name == "own_momentum" and usual.optimizer != "sgd":
            continue  # which is refused where it has no effect
        if field.name != "unit" or method in masks:  # of channel methods there is but one
            other = replace(usual, **{field.name: changed(field.name, getattr(usual, field.name))})
            assert other.dump() != usual.dump(), field.name


@dataclass(frozen=True)
class Mine(Method):
    name, title = "mine", "Mine"
    noise_alpha: Positive = option(1e-6, "an option that has the name of another method's")

    def __call__(self, model, task):
        return {}


def test_a_method_from_outside_has_keys_of_its_own(monkeypatch):
    "With no list to add it to, and an option whose values make different keys."
    monkeypatch.setitem(METHODS, "mine", Mine)
    one, two = (
        run_key(resolve("quick", method="mine", noise_alpha=alpha, device="cpu"))
        for alpha in (1e-5, 1e-3)
    )
    assert one != two


def test_a_quiet_option_added_later_changes_no_key(monkeypatch):
    "All keys stay at its default, and another value has another."

    @dataclass(frozen=True)
    class Later(METHODS["fisher_mask"]):
        sharpness: float = option(1.0, "how sharp", quiet=True)

    before = run_key(resolve("quick", device="cpu"))
    monkeypatch.setattr(
        Later, "presets", {name: Later(**vars(m)) for name, m in Later.presets.items()}
    )
    monkeypatch.setitem(METHODS, "fisher_mask", Later)
    assert run_key(resolve("quick", device="cpu")) == before
    assert run_key(resolve("quick", device="cpu", sharpness=2.0)) != before
    old = [r for f in sorted(FIGURES.rglob("*.parquet"))[:4] for r in read_kept(f)]
    assert len(old) > 20
    for record in old:
        chosen = RunSettings.of(**record["settings"])
        made = run_key(chosen) if "request" in record else training_key(chosen)
        assert made == record["key"]


# Selection


def test_a_ratio_of_less_than_one_unit_is_said():
    pool = candidates(dense(), "channel")
    scores = {n: torch.rand(s) for n, s in pool.shapes.items()}
    for select in (lambda r: select_top(scores, r, pool), lambda r: select_random(r, pool, 0)):
        with pytest.warns(
            UserWarning,
            match="`ratio` is 0.02, and the pool has 12 units .channels.: that is less than one",
        ):
            assert select(0.02) == {}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert select(0) == {}
            assert select(0.1)


def test_scores_that_are_nan_are_refused_or_said():
    pool = candidates(dense(), "channel")
    scores = {n: torch.full((6,), torch.nan) for n in pool.shapes}
    for select in (select_top, select_bottom):
        with pytest.raises(ValueError, match="`0.weight` are not all numbers"):
            select(scores, 0.5, pool)
    with pytest.warns(UserWarning, match="all units that may be masked are masked"):
        assert all(m.all() for m in select_bottom(scores, 0.5, pool, nan="highest").values())


@pytest.mark.parametrize(
    "mask",
    [
        {"module.0.weight": torch.ones(6, 6) > 0},
        {"0.weight": torch.ones(6) > 0},
        {"0.weight": torch.ones(6, 6)},
        {"9.bias": torch.ones(1) > 0},
    ],
)
def test_masks_that_do_not_fit_change_nothing(mask):
    model = dense()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="the mask"):
        zero_(model, {"2.weight": torch.ones(6, 6) > 0, **mask})
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


# Nothing is left behind


def test_a_network_that_keeps_and_counts_is_as_before():
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.kept, self.seen = dense(), None, 0
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.seen += 1
            self.count = self.count + 1
            if self.kept is None:
                self.kept = torch.ones(6)
            self.features = self.layers(x * self.kept)
            return self.features

    model = Keeping()
    parts = dict(model.__dict__), model.count, list(model.parameters())
    for method in ("random_mask", "mask_classifier"):
        forget(model, method, fine_tune=TUNE)
    candidates(model)
    assert model.seen == 0 and model.kept is None and not hasattr(model, "features")
    assert model.count is parts[1] and model.count == 0
    assert all(a is b and a.grad is None for a, b in zip(model.parameters(), parts[2]))
