"""Readouts where the answer is known, each beside a slow definition."""

import copy
import itertools
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fisher_unlearn import unlearn
from fisher_unlearn.audit.answers import Answers, answers_of, balanced
from fisher_unlearn.audit.comeback import Mixed, _epoch, comeback
from fisher_unlearn.audit.features import features_of, linear_probe
from fisher_unlearn.audit.floor import Floor, bootstrap, equivalence, holm, largest_difference
from fisher_unlearn.audit.membership import _measured, area, by_chance, klom, membership
from fisher_unlearn.audit.membership import rate_at, rmia, ulira
from fisher_unlearn.audit.readouts import relearn_time
from fisher_unlearn.audit.report_card import audit, tow
from fisher_unlearn.images.data import load_images
from fisher_unlearn.images.forget import forget_class
from fisher_unlearn.networks.metrics import accuracy
from fisher_unlearn.networks.schedule import Schedule
from fisher_unlearn.networks.train import TrainSettings, train_model

G = torch.Generator().manual_seed(0)
CENTRES = 3 * torch.randn(4, 1, 6, 6, generator=G)
NOTHING = settings(max_examples=60, derandomize=True, database=None, deadline=None)


def points(count, seed):
    "Images of four classes, each around its centre."
    y = torch.arange(count) % 4
    noise = torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
    return CENTRES[y] + 2 * noise, y


X, Y = points(160, 1)
TX, TY = points(160, 2)
TRAIN = TrainSettings(Schedule(lr=0.05, epochs=15, drops=(10,)), batch_size=32, select="last")


def net(seed):
    torch.manual_seed(seed)
    first = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*first, nn.Linear(128, 4))


def cut(x, y, where, size=32):
    x, y = x[where], y[where]
    return list(zip(x.split(size), y.split(size)))


FORGET, REMAIN, ALL = cut(X, Y, Y == 0), cut(X, Y, Y > 0), cut(X, Y, Y >= 0)
TESTS = {"forget": cut(TX, TY, TY == 0), "remain": cut(TX, TY, TY > 0)}


@pytest.fixture(scope="module")
def models():
    "w*, one whose row was deleted, and three that never saw class 0."
    w_star, *others = (net(seed) for seed in range(4))
    train_model(w_star, ALL, TRAIN, progress="none")
    for other in others:
        train_model(other, REMAIN, TRAIN, progress="none")
    row = unlearn(w_star, FORGET, REMAIN, method="mask_classifier", progress="none").model
    with torch.no_grad():
        row[-1].bias[0] = -50.0  # below all others, as a row of zeros is in a larger network
    return w_star, row, others


def said(*logits, labels=None):
    logits = torch.tensor(logits, dtype=torch.float64)
    labels = torch.zeros(len(logits), dtype=torch.int64) if labels is None else labels
    return Answers(logits.log_softmax(1), labels)


def test_answers_are_those_of_the_model(models):
    w_star = models[0]
    found = answers_of(w_star, ALL)
    with torch.no_grad():
        p = w_star.eval()(X).double().softmax(1)
    own = p[torch.arange(160), Y]
    assert torch.allclose(found.losses, -own.log())
    assert torch.allclose(found.margins, (own / (1 - own)).log(), rtol=1e-6)
    assert found.accuracy == pytest.approx(accuracy(w_star, ALL))
    for row, label, others in zip(p, Y, found.others):
        rest = row.index_fill(0, label, 0)
        wanted = (rest / rest.sum()).log().index_fill(0, label, 0)
        assert torch.allclose(others, wanted)


def test_margins_keep_their_digits_where_a_model_is_sure():
    margin = said([800.0, 0.0, -3.0]).margins.item()
    assert margin == pytest.approx(800 - math.log(1 + math.exp(-3)), rel=1e-12)


def test_a_draw_has_as_many_of_each_class_from_every_set():
    one = Answers(torch.zeros(9, 3), torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2]))
    two = Answers(torch.zeros(7, 3), torch.tensor([0, 1, 1, 1, 1, 1, 3 % 3]))
    a, b = balanced([one, two], seed=3)
    assert a.labels.bincount().tolist() == b.labels.bincount().tolist() == [2, 2]


scores = st.lists(st.integers(-4, 4), min_size=1, max_size=12)


@NOTHING
@given(scores, scores)
def test_the_area_is_that_of_all_pairs_and_of_sklearn(a, b):
    pairs = [(x > y) + 0.5 * (x == y) for x in a for y in b]
    found = area(torch.tensor(a), torch.tensor(b))
    assert found == pytest.approx(sum(pairs) / len(pairs))
    assert found == pytest.approx(roc_auc_score([1] * len(a) + [0] * len(b), [*a, *b]))


@NOTHING
@given(scores, scores, st.sampled_from([0.0, 0.01, 0.1, 0.25, 0.5]))
def test_the_rate_is_that_of_the_best_allowed_cut(a, b, false):
    cuts = [
        sum(x > c for x in a) / len(a)
        for c in [-9, *a, *b]
        if sum(y > c for y in b) <= false * len(b) + 1e-9
    ]
    assert rate_at(torch.tensor(a), torch.tensor(b), false) == pytest.approx(max(cuts))


def test_membership_tells_what_is_told_apart_and_nothing_else():
    draw = lambda seed: torch.randn(300, 5, generator=torch.Generator().manual_seed(seed)).double()
    labels = torch.zeros(300, dtype=torch.int64)
    make = lambda logits: Answers(logits.log_softmax(1), labels)
    same = membership(make(draw(1)), make(draw(2)))
    assert all(0.4 < m.area < 0.6 and 0.42 < m.accuracy < 0.58 for m in same.values())
    sure = draw(1)
    sure[:, 0] += 4
    told = membership(make(sure), make(draw(2)))
    assert told["loss"].area > 0.95 and told["loss"].true_positives > 0.5
    assert 0.4 < told["others"].area < 0.6  # only the label's logit differs


def test_a_deleted_row_hides_from_the_loss_and_not_from_the_other_classes():
    leaning = torch.randn(300, 5, generator=torch.Generator().manual_seed(1)).double()
    plain = torch.randn(300, 5, generator=torch.Generator().manual_seed(2)).double()
    leaning[:, 3] += 2
    for logits in (leaning, plain):
        logits[:, 0] = -1e6
    labels = torch.zeros(300, dtype=torch.int64)
    found = membership(*(Answers(z.log_softmax(1), labels) for z in (leaning, plain)))
    assert found["others"].area > 0.85 and found["others"].images == 300


@pytest.mark.parametrize(
    ("columns", "images", "level"), [(1, 20, 0.05), (9, 50, 0.05), (60, 20, 0.1)]
)
def test_chance_gives_no_more_than_it_is_said_to(columns, images, level):
    "Over many attacks on noise; that of the ranks alone is passed nearly twice as often."
    drawn, limit = torch.Generator().manual_seed(0), by_chance(images, level)
    draw = lambda: torch.randn(2 * images, columns, generator=drawn, dtype=torch.float64)
    areas = np.array([_measured(draw(), images, seed).area for seed in range(200)])
    assert stats.binomtest(int((areas > limit).sum()), 200, level, "greater").pvalue > 0.01
    ranks = stats.norm(0.5, math.sqrt((2 * images + 1) / (12 * images**2)))
    assert limit - 0.5 == pytest.approx(math.sqrt(2) * (ranks.isf(level) - 0.5))
    assert columns == 1 or (areas > ranks.isf(level)).mean() > level


def test_chance_is_refused_for_levels_that_are_none():
    for level in (0.0, 0.5, 0.9):
        with pytest.raises(ValueError, match="must lie between 0 and 0.5"):
            by_chance(20, level)
    assert by_chance(1) == 1.0 and by_chance(10**9) == pytest.approx(0.5, abs=1e-4)


def test_too_few_images_are_refused():
    few = Answers(torch.zeros(5, 3), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="membership needs 10"):
        membership(few, few)


def test_rmia_is_its_definition():
    draw = torch.Generator().manual_seed(0)
    target, references = torch.rand(6, generator=draw), torch.rand(3, 6, generator=draw)
    population, beside = torch.rand(11, generator=draw), torch.rand(3, 11, generator=draw)
    found = rmia(target, references, population, beside, gamma=1.5, offset=0.3)
    for k in range(6):
        count = 0
        for z in range(11):
            px = (1.3 * float(references[:, k].mean()) + 0.7) / 2
            pz = (1.3 * float(beside[:, z].mean()) + 0.7) / 2
            count += (float(target[k]) / px) / (float(population[z]) / pz) >= 1.5
        assert found[k] == pytest.approx(count / 11)
    for count in (1, 9):
        with pytest.raises(ValueError, match="RMIA takes 2 to 8"):
            rmia(target, torch.rand(count, 6), population, torch.rand(count, 11))


def test_rmia_counts_ties_and_large_sets_as_its_definition_does():
    p = torch.tensor([0.0, 0.25, 0.5, 1.0]).double()
    same = torch.full((2, 4), 0.5).double()
    found = rmia(p, same, p, same, gamma=2.0)
    assert found.tolist() == [0.25, 0.25, 0.5, 0.75]  # 0 ≥ 2·0, and .5 ≥ 2·.25


FEW, MANY = torch.rand(4, 5), torch.rand(64, 5)
UNFIT = {
    "area": lambda: area(torch.tensor([math.nan]), torch.rand(3)),
    "area, none": lambda: area(torch.rand(0), torch.rand(3)),
    "area, a table": lambda: area(torch.rand(3, 2), torch.rand(3)),
    "rate, none": lambda: rate_at(torch.rand(3), torch.rand(0)),
    "rmia, images": lambda: rmia(FEW[0], torch.rand(4, 6), FEW[1], FEW),
    "rmia, population": lambda: rmia(FEW[0], FEW, torch.rand(6), FEW),
    "rmia, models": lambda: rmia(FEW[0], FEW, FEW[1], FEW[:2]),
    "rmia, logits": lambda: rmia(3 + FEW[0], FEW, FEW[1], FEW),
    "rmia, nan": lambda: rmia(FEW[0] * math.nan, FEW, FEW[1], FEW),
    "ulira, images": lambda: ulira(FEW, FEW[:, :4]),
    "ulira, one row": lambda: ulira(FEW[0], FEW[1]),
    "ulira, nan": lambda: ulira(FEW * math.nan, FEW),
    "klom, images": lambda: klom(MANY, MANY[:, :4]),
    "klom, inf": lambda: klom(MANY / 0, MANY),
    "probe, widths": lambda: linear_probe((FEW, Y[:4]), (FEW[:, :4], Y[:4]), [0]),
    "probe, counts": lambda: linear_probe((FEW, Y[:3]), (FEW, Y[:4]), [0]),
    "probe, nan": lambda: linear_probe((FEW * math.nan, Y[:4]), (FEW, Y[:4]), [0]),
    "answers, counts": lambda: Answers(FEW, Y[:3]),
    "answers, classes": lambda: Answers(FEW[:, :3], Y[:4]),
    "answers, nan": lambda: Answers(FEW * math.nan, Y[:4]),
    "balanced, classes": lambda: balanced([Answers(FEW, Y[:4]), Answers(FEW[:, :4], Y[:4])]),
    "balanced, none": lambda: balanced([]),
    "floor, none": lambda: Floor(()),
    "floor, nan": lambda: Floor((0.5, math.nan)),
    "bootstrap, none": lambda: bootstrap([]),
    "bootstrap, rows": lambda: bootstrap([[1.0, 2.0], [3.0]]),
    "bootstrap, share": lambda: bootstrap([[1.0, 2.0]], share=1.5),
    "holm": lambda: holm({"a": 2.0}),
    "tow, lacking": lambda: tow({"forget": 1.0}, {"remain": 1.0}),
    "tow, out of range": lambda: tow({"forget": 1.0}, {"forget": -300.0}),
}


@pytest.mark.parametrize("call", UNFIT.values(), ids=UNFIT)
def test_what_does_not_fit_is_refused_in_one_sentence(call):
    with pytest.raises(ValueError) as found:
        call()
    assert str(found.value).endswith(".") and str(found.value).count(". ") == 0


def test_ulira_judges_each_model_by_fits_that_it_is_left_out_of():
    unlearned = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).double() + 1
    retrained = torch.randn(5, 7, generator=torch.Generator().manual_seed(2)).double()
    inside, outside = [], []

    def ratio(value, own, other):
        return stats.norm.logpdf(value, own.mean(), own.std(ddof=1)) - stats.norm.logpdf(
            value, other.mean(), other.std(ddof=1)
        )

    for k, x in itertools.product(range(5), range(7)):
        gone, never = (np.delete(kind[:, x].numpy(), k) for kind in (unlearned, retrained))
        inside.append(ratio(float(unlearned[k, x]), gone, never))
        outside.append(-ratio(float(retrained[k, x]), never, gone))
    found = ulira(unlearned, retrained)
    assert found.area == pytest.approx(area(torch.tensor(inside), torch.tensor(outside)))
    right = sum(v > 0 for v in inside) + sum(v <= 0 for v in outside)
    assert found.accuracy == pytest.approx(right / (2 * 5 * 7))
    for other in (unlearned[:3], unlearned[:4]):
        with pytest.raises(ValueError, match="which takes four or more, and as many of either"):
            ulira(other, retrained[:3] if len(other) == 3 else retrained)


def test_ulira_of_few_models_of_one_distribution_is_chance():
    draw = lambda seed: torch.randn(4, 4000, generator=torch.Generator().manual_seed(seed))
    found = ulira(draw(1), draw(2))
    assert found.area == pytest.approx(0.5, abs=0.015)
    assert found.accuracy == pytest.approx(0.5, abs=0.015)


def test_ulira_and_klom_know_equal_from_shifted():
    draw = lambda k, shift, seed: (
        shift + torch.randn(k, 200, generator=torch.Generator().manual_seed(seed))
    )
    assert (
        0.4
        < ulira(draw(8, 0, 1), draw(8, 0, 2)).area
        < 0.6
        < ulira(draw(8, 2, 1), draw(8, 0, 2)).area
    )
    same = klom(draw(64, 0, 1), draw(64, 0, 2)).mean()
    assert same < 0.5 * klom(draw(64, 1, 1), draw(64, 0, 2)).mean()
    with pytest.raises(ValueError, match="below 64"):
        klom(draw(63, 0, 1), draw(64, 0, 2))


def test_klom_is_the_divergence_of_histograms():
    one, two = torch.randn(70), torch.randn(70) + 1
    edges = np.linspace(min(one.min(), two.min()), max(one.max(), two.max()), 21)
    p, q = (np.histogram(v.numpy(), edges)[0] + 0.5 for v in (one, two))
    p, q = p / p.sum(), q / q.sum()
    wanted = float((p * np.log(p / q)).sum())
    assert klom(one[:, None], two[:, None])[0] == pytest.approx(wanted, rel=0.05)


def test_features_are_what_the_classifier_gets(models):
    w_star = models[0]
    features, labels = features_of(w_star, ALL)
    with torch.no_grad():
        assert torch.allclose(features, w_star.eval()[:-1](X), atol=1e-6)
    assert torch.equal(labels, Y)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrappers_are_seen_through(models, wrap):
    w_star, row, _ = models
    wrapped = wrap(copy.deepcopy(row))
    wrapped(X)
    assert torch.equal(features_of(wrapped, ALL)[0], features_of(row, ALL)[0])
    tests = {"tests": TESTS, "classes": [0], "relearn": TRAIN, "cap": 1}
    given = {"original": w_star, "forget": FORGET, "remain": REMAIN, **tests}
    ours, plain = (audit(m, **given).table.model for m in (wrapped, row))
    assert ours.equals(plain)


def test_a_probe_reads_what_is_there_and_no_more():
    draw = torch.Generator().manual_seed(0)
    y, noise = torch.arange(400) % 4, torch.randn(400, 6, generator=draw)
    there = noise.clone()
    there[:, 2] += 4.0 * (y == 1)
    half = torch.arange(400) < 200
    parts = lambda f: ((f[half], y[half]), (f[~half], y[~half]))
    assert linear_probe(*parts(there), [1]) > 90
    assert 40 < linear_probe(*parts(noise), [1]) < 60
    with pytest.raises(ValueError, match="images of the classes"):
        linear_probe((noise, y), (noise[y == 1], y[y == 1]), [1])


def test_a_deleted_row_leaves_the_probe_where_it_was(models):
    w_star, row, _ = models
    tests = cut(TX, TY, TY >= 0)
    probes = [linear_probe(features_of(m, ALL), features_of(m, tests), [0]) for m in (w_star, row)]
    assert probes[0] == probes[1] > 80 and accuracy(row, FORGET) == 0


def test_a_comeback_counts_steps_and_leaves_the_model(models):
    w_star, row, others = models
    before = copy.deepcopy(row.state_dict())
    known = comeback(w_star, w_star, ALL, FORGET, TRAIN)
    assert known.epochs == 0 and len(known.curve) == 1
    zeroed = unlearn(w_star, FORGET, REMAIN, method="mask_classifier", progress="none").model
    back = comeback(zeroed, w_star, ALL, FORGET, TRAIN, cap=5)
    fresh = comeback(others[0], w_star, ALL, FORGET, TRAIN, cap=5)
    assert back.epochs is not None and back.epochs <= (fresh.epochs or 6)
    assert all(torch.equal(t, before[n]) for n, t in row.state_dict().items())
    target = 0.95 * accuracy(w_star, FORGET)
    curve = back.curve
    assert back.target == target and (curve.forget_acc.iloc[:-1] < target).all()
    asked = [0, *(number / len(ALL) for number in (1, 2, 4)), *range(1, 6)]
    assert curve.epoch.tolist() == asked[: len(curve)]


def test_a_comeback_is_plain_training(models):
    "All parameters, one epoch: what a loop of torch makes of a copy."
    w_star, row, _ = models
    plain = copy.deepcopy(row)
    sgd = torch.optim.SGD(plain.parameters(), 0.05, 0.9, weight_decay=1e-4)
    accs = [accuracy(plain, FORGET)]
    for number, (x, y) in enumerate(ALL, 1):
        plain.train()
        sgd.zero_grad()
        nn.functional.cross_entropy(plain(x), y).backward()
        sgd.step()
        if number in (1, 2, 4, 5):
            accs.append(accuracy(plain, FORGET))
    found = comeback(row, w_star, ALL, FORGET, TRAIN, "all", cap=1)
    assert found.curve.forget_acc.tolist() == accs[: len(found.curve)]


def test_a_classifier_that_learns_alone_leaves_the_statistics_still(models):
    "What a linear layer makes of features that never move."
    w_star, row, others = models
    plain = copy.deepcopy(others[0]).eval()
    sgd = torch.optim.SGD(plain[-1].parameters(), 0.05, 0.9, weight_decay=1e-4)
    accs = [accuracy(plain, FORGET)]
    for number, (x, y) in enumerate(ALL * 2, 1):
        sgd.zero_grad()
        nn.functional.cross_entropy(plain(x), y).backward()
        sgd.step()
        if number in (1, 2, 4, 5, 10):
            accs.append(accuracy(plain, FORGET))
    found = comeback(others[0], w_star, ALL, FORGET, TRAIN, cap=2)
    assert found.curve.forget_acc.tolist() == accs[: len(found.curve)] and len(found.curve) > 3


@NOTHING
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 9))
def test_every_batch_has_of_each_set_its_share(counts, size):
    sets = [
        list(zip(part.split(size), torch.full_like(part, kind).split(size)))
        for kind, part in enumerate(torch.arange(sum(counts)).split(counts))
    ]
    mixed = Mixed(*sets)
    batches = list(mixed)
    whole = math.ceil(sum(counts) / min(size, max(counts)))
    assert len(batches) == len(mixed) == max(1, min(whole, max(counts) // 2))
    assert min(len(kinds) for _, kinds in batches) >= min(2, sum(counts))
    assert torch.cat([x for x, _ in batches]).sort().values.tolist() == [*range(sum(counts))]
    for _, kinds in batches:
        for kind, count in enumerate(counts):
            assert abs((kinds == kind).sum() - count / len(mixed)) < 1


def test_sets_of_ours_are_mixed_in_a_new_order_each_pass():
    images = load_images("digits")
    request = forget_class(images, 3)
    mixed = Mixed(request.forget.batches(64), request.remain.batches(64))
    passes = [[*_epoch(mixed, torch.Generator().manual_seed(seed), 10)] for seed in (1, 1, 2)]
    first, again, other = (torch.cat([x.flatten(1) for x, _ in found]) for found in passes)
    assert torch.equal(first, again) and not torch.equal(first, other)
    whole = [rows[np.lexsort(rows.T)] for rows in (first.numpy(), other.numpy())]
    assert len(first) == len(images.train) and np.array_equal(*whole)
    share = len(request.forget) / len(images.train)
    assert all(abs((y == 3).double().mean() - share) < 0.04 for _, y in passes[0])


def test_a_class_comes_back_by_the_loss_that_w_star_was_trained_with(models):
    w_star, row, _ = models
    asked = []

    def counted(logits, labels):
        asked.append(logits.requires_grad)
        return nn.functional.cross_entropy(logits, labels, label_smoothing=0.2)

    comeback(row, w_star, ALL, FORGET, replace(TRAIN, loss=counted), "all", cap=1)
    assert sum(asked) >= 1  # in training, and not only in the trial before
    with pytest.raises(ValueError, match="can't be taken of logits"):
        comeback(row, w_star, ALL, FORGET, replace(TRAIN, loss="binary_cross_entropy"), "all")


@pytest.mark.parametrize("change", [{"optimizer": "adamw"}, {"clip": 1e-3}])
def test_a_class_comes_back_by_the_steps_that_w_star_was_trained_with(models, change):
    "One step of the optimiser, or of SGD on gradients of the norm 0.001."
    w_star, row, _ = models
    ways = replace(TRAIN, **change)
    plain = copy.deepcopy(row).train()
    usual = {"lr": 0.05, "weight_decay": 1e-4}
    kinds = {"adamw": torch.optim.AdamW}
    step = kinds.get(change.get("optimizer"), torch.optim.SGD)(plain.parameters(), **usual)
    nn.functional.cross_entropy(plain(ALL[0][0]), ALL[0][1]).backward()
    if "clip" in change:
        whole = math.sqrt(sum(p.grad.square().sum().item() for p in plain.parameters()))
        for p in plain.parameters():
            p.grad *= change["clip"] / whole
    step.step()
    met = []

    def seen(logits, labels):
        met.append(logits.detach().clone())
        return nn.functional.cross_entropy(logits, labels)

    comeback(row, w_star, ALL[:2], FORGET, replace(ways, loss=seen), "all", cap=1)
    assert torch.allclose(met[-1], plain(ALL[1][0]), atol=1e-5)


@pytest.mark.parametrize("scope", ["classifier", "all"])
def test_a_comeback_draws_apart(models, scope):
    "Dropout and a loader that shuffles: the same again, and the generators stay where they were."
    torch.manual_seed(0)
    parts = [nn.Flatten(), nn.Linear(36, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 4)]
    model, whole = nn.Sequential(*parts), loader(X, Y)
    state = torch.get_rng_state()
    slow = replace(TRAIN, schedule=Schedule(lr=3e-4, epochs=9, drops=()))
    once, again = (comeback(model, models[0], whole, FORGET, slow, scope, 2) for _ in range(2))
    assert once.curve.equals(again.curve) and len(once.curve) > 2
    assert torch.equal(torch.get_rng_state(), state)


ONE = [(X[1:2], Y[1:2])]


@pytest.mark.parametrize("train", [[*REMAIN, *ONE], Mixed(ONE * 9)])
def test_a_single_image_is_no_batch_of_a_network_that_norms_over_it(train):
    "Nor where the paper's time is counted."
    torch.manual_seed(0)
    parts = [nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)]
    model = nn.Sequential(*parts).eval()
    known = copy.deepcopy(model)
    with torch.no_grad():
        model[-1].bias[0], known[-1].bias[0] = -50.0, 50.0
    found = comeback(model, known, train, FORGET, TRAIN, "all", cap=1)
    assert found.target == 95 and found.epochs is None and len(found.curve) > 1
    quiet = {"scope": "all", "cap": 1, "progress": "none"}
    assert relearn_time(model, known, [*train], FORGET, TRAIN, **quiet).cap == 1


def test_a_pass_that_can_not_be_repeated_is_not_mixed():
    for bad, message in ((iter(FORGET), "only once"), ([], "is empty")):
        with pytest.raises((TypeError, ValueError), match=message):
            Mixed(REMAIN, bad)


def test_the_remain_set_alone_does_not_teach_what_it_lacks(models):
    w_star, row, others = models
    found = comeback(others[0], w_star, REMAIN, FORGET, TRAIN, "all", cap=2)
    assert found.epochs is None and found.note == "more than 2 epochs"


def test_positions_are_marks_and_a_readout_that_tells_nothing_has_none():
    floor = Floor((0.2, 0.3, 0.25))
    assert floor.position(0.25, 0.75) == pytest.approx(1)
    assert floor.position(0.75, 0.75) == 0 and floor.position(0.5, 0.75) == pytest.approx(0.5)
    assert floor.position(0.9, 0.27) is None  # w* lies among them
    assert Floor((0.2,)).position(0.4, 0.9) is None


def test_equivalence_is_two_tests_of_scipy_and_says_nothing_below_three():
    rows, margin = [[0.3, -0.1], [-0.2, -0.2], [0.0, 0.1], [0.4, 0.2], [0.1, -0.3]], 0.5
    values = [(a + b) / 2 for a, b in rows]
    below = stats.ttest_1samp(values, -margin, alternative="greater").pvalue
    above = stats.ttest_1samp(values, margin, alternative="less").pvalue
    assert equivalence(rows, margin) == pytest.approx(max(below, above))
    assert equivalence([[v] for v in values], margin) == equivalence(rows, margin)
    assert equivalence(rows[:2], margin) is None and equivalence([[0.0] * 30], margin) is None
    assert equivalence([[0.25]] * 4, 0.5) == 0 and equivalence([[0.75]] * 4, 0.5) == 1
    assert equivalence([[0.0]] * 3, 0) == 0 and equivalence([[0.1], [0.0], [0.0]], 0) > 0.5
    assert largest_difference([1.0, 4.0, 2.5]) == 3
    with pytest.raises(ValueError, match="two reference models"):
        largest_difference([1.0])


def test_equivalence_errs_as_rarely_as_it_says():
    "At a difference as large as the margin, also where all classes of a seed differ together."
    rng = np.random.default_rng(1)
    tables = [1.0 + rng.normal(0, 1, (6, 1)) + rng.normal(0, 1, (6, 10)) for _ in range(2000)]
    wrong = [equivalence(table.tolist(), 1.0) < 0.05 for table in tables]
    assert 0.03 < np.mean(wrong) < 0.07


@NOTHING
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_step_down(values):
    found = holm({str(k): p for k, p in enumerate(values)})
    order = sorted(range(len(values)), key=lambda k: values[k])
    least = 0.0
    for place, k in enumerate(order):
        least = max(least, min(1.0, (len(values) - place) * values[k]))
        assert found[str(k)] == pytest.approx(least)


def test_the_bootstrap_covers_the_mean_and_widens_with_what_seeds_share():
    rng, hits = np.random.default_rng(0), 0
    for trial in range(120):
        table = rng.normal(0, 1, (8, 1)) + rng.normal(0, 0.5, (8, 5))
        low, high = bootstrap(table.tolist(), draws=400, seed=trial)
        hits += low <= 0 <= high
    assert 0.8 < hits / 120 <= 1
    shared = rng.normal(0, 3, (4, 1)) + rng.normal(0, 0.1, (4, 6))
    alike = bootstrap(shared.reshape(1, -1).tolist())
    low, high = bootstrap(shared.tolist())
    assert high - low > alike[1] - alike[0]


def test_of_one_or_two_nothing_is_drawn():
    "The interval of two seeds is that of their means by class, and those of one class of its own."
    rng = np.random.default_rng(3)
    table = rng.normal(0, 1, (2, 6)) + np.array([[0.0], [50.0]])
    assert bootstrap(table.tolist()) == pytest.approx(bootstrap([table.mean(0).tolist()]))
    low, high = bootstrap(table.T.tolist())
    assert table.mean() - 3 < low < high < table.mean() + 3
    assert bootstrap([[5.0]]) is None and bootstrap([[1.0, 2.0], [3.0, 4.0]]) is None


def test_tow_is_one_for_retraining_and_less_for_all_else():
    accs = {"forget": 10.0, "remain": 90.0, "test": 80.0}
    assert tow(accs, accs) == 1
    assert tow({**accs, "forget": 60.0}, accs) == pytest.approx(0.5)
    assert tow({"forget": 0.0, "remain": 80.0, "test": 60.0}, accs) == pytest.approx(
        0.9 * 0.9 * 0.8
    )


def test_a_card_has_every_number_beside_w_star_and_the_floor(models):
    w_star, row, others = models
    before = [copy.deepcopy(m.state_dict()) for m in (w_star, row, *others)]
    given = {"original": w_star, "forget": FORGET, "remain": REMAIN, "tests": TESTS}
    card = audit(row, **given, retrained=others, classes=[0], relearn=TRAIN, cap=1)
    after = [m.state_dict() for m in (w_star, row, *others)]
    assert all(torch.equal(a[n], t) for a, b in zip(after, before) for n, t in b.items())
    table = card.table
    assert table.model["accuracy, forget"] == accuracy(row, FORGET) == 0
    assert table.w_star["accuracy, test_remain"] == pytest.approx(accuracy(w_star, TESTS["remain"]))
    retrained = [accuracy(m, REMAIN) for m in others]
    assert table.low["accuracy, remain"] == pytest.approx(min(retrained))
    assert table.position["accuracy, forget"] == 1
    assert table.model["linear probe"] == table.w_star["linear probe"]
    every = Mixed(FORGET, REMAIN)
    for name, scope in (("classifier alone", "classifier"), ("all parameters", "all")):
        times = [
            comeback(m, w_star, every, FORGET, TRAIN, scope, cap=1).epochs or 2
            for m in (row, *others)
        ]
        marks = table.loc[f"comes back, {name} (epochs)"]
        assert (marks.model, marks.low, marks.high) == (times[0], min(times[1:]), max(times[1:]))
    (lacking,) = card.missing
    assert lacking.startswith("RMIA of a class needs models that saw half of it")
    pairs = [
        100
        * (
            answers_of(a, FORGET).log_probabilities.argmax(1)
            == answers_of(b, FORGET).log_probabilities.argmax(1)
        )
        .double()
        .mean()
        .item()
        for a, b in itertools.combinations(others, 2)
    ]
    assert table.low["agreement, forget"] == pytest.approx(min(pairs))
    assert table.middle["agreement, forget"] == pytest.approx(sum(pairs) / 3)
    assert isinstance(card.table, pd.DataFrame) and "<table" in card._repr_html_()
    figure = card.draw()
    assert len(figure.axes) == 1


def test_a_retrained_model_stands_at_one_and_w_star_at_nought(models):
    w_star, _, others = models
    given = {"original": w_star, "forget": FORGET, "remain": REMAIN, "tests": TESTS}
    as_w_star = audit(w_star, **given, retrained=others).table.position.dropna()
    assert (as_w_star == 0).all() and {"accuracy, forget", "divergence, forget"} <= {
        *as_w_star.index
    }
    new = audit(others[0], **given, retrained=others[1:]).table
    assert new.position["accuracy, forget"] == 1
    apart = new.loc["divergence, forget"]  # of two retrained models there is but one pair
    assert apart.low == apart.high and math.isnan(apart.position)
    assert abs(apart.model - apart.middle) < (apart.w_star - apart.middle) / 2


def test_tow_has_one_test_set_and_its_variant_the_attack(models):
    "Both by a slow count over all images of three sets."
    w_star, row, others = models
    given = {"original": w_star, "forget": FORGET, "remain": REMAIN, "tests": TESTS}
    table = audit(row, **given, retrained=others[:1]).table
    sets = {"forget": FORGET, "remain": REMAIN, "test": [*TESTS["forget"], *TESTS["remain"]]}

    def left(names):
        gaps = [abs(accuracy(row, sets[n]) - accuracy(others[0], sets[n])) / 100 for n in names]
        return math.prod(1 - gap for gap in gaps)

    assert table.model["ToW"] == pytest.approx(left(sets))
    told = table.loc["membership by loss, accuracy"]
    gap = abs(told.model - told.middle)
    by = table.model["ToW, by membership"]
    assert by == pytest.approx((1 - gap) * left(["remain", "test"]))
    bare = audit(row, original=w_star, forget=FORGET, remain=REMAIN, retrained=others[:1])
    assert not any(name.startswith("ToW") for name in bare.table.index)
    assert "Without test images of the other classes there is no ToW." in bare.missing


def loader(x, y, seed=None, read=None):
    "A DataLoader that shuffles, by its own generator or by torch's."
    data = TensorDataset(x, y) if read is None else read
    own = None if seed is None else torch.Generator().manual_seed(seed)
    return DataLoader(data, 32, shuffle=True, generator=own)


@pytest.mark.parametrize("seed", [None, 3])
def test_loaders_that_shuffle_give_all_models_the_same_images(models, seed):
    w_star, _, others = models
    gone = Y == 0
    forget, remain = loader(X[gone], Y[gone], seed), loader(X[~gone], Y[~gone], seed)
    state = torch.get_rng_state()
    table = audit(
        others[0], original=w_star, forget=forget, remain=remain, retrained=[others[0]]
    ).table
    assert torch.equal(torch.get_rng_state(), state)
    assert table.model["agreement, remain"] == table.model["agreement, forget"] == 100
    assert table.model["divergence, remain"] == 0 < table.w_star["divergence, remain"]


class Redrawn(TensorDataset):
    "Images that are turned by a generator of their own."

    rng = np.random.default_rng(0)

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + float(self.rng.normal()), y


def test_images_that_come_anew_at_each_pass_are_refused(models):
    w_star, row, _ = models
    anew = loader(X, Y, read=Redrawn(X[Y > 0], Y[Y > 0]))
    with pytest.raises(ValueError, match="`remain` gives other images at each pass"):
        audit(row, original=w_star, forget=FORGET, remain=anew)


def test_images_that_are_no_numbers_are_no_other_images(models):
    w_star, row, _ = models
    broken = [(torch.full_like(x, math.nan), y) for x, y in REMAIN]
    with pytest.raises(FloatingPointError):
        audit(row, original=w_star, forget=FORGET, remain=broken)


def test_whether_classes_are_gone_is_seen_from_the_labels(models):
    w_star, row, others = models
    given = {"original": w_star, "forget": FORGET, "remain": REMAIN, "tests": TESTS}
    ways = given | {"retrained": others}
    seen, said = audit(row, **ways), audit(row, **ways, classes=[0])
    assert seen.table.equals(said.table) and "linear probe" in seen.table.index
    assert not any("RMIA" in name for name in seen.table.index)
    with pytest.raises(ValueError, match=r"`classes` is \[2\], and `forget` has the labels \[0\]"):
        audit(row, **given, classes=[2])
    with pytest.raises(ValueError, match=r"`remain` \[0\] of them"):
        audit(row, **(given | {"remain": ALL}), classes=[0])


def test_what_asks_the_classifier_is_left_out_where_it_is_not_known():
    def scaled(seed):
        "Its logits are those of no linear layer."
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.LayerNorm(4))

    one, other = scaled(0), scaled(1)
    given = {"original": one, "forget": FORGET, "remain": REMAIN, "tests": TESTS}
    found = audit(other, **given, relearn=TRAIN, cap=1)
    asked = {name for name in found.table.index if name.startswith(("comes back", "linear"))}
    assert asked == {f"comes back, {w} (epochs)" for w in ("all parameters", "by the remain set")}
    assert "What asks the classifier or its inputs needs its name, `classifier`." in found.missing
    named = audit(other, **given, classifier="1").table
    assert "linear probe" in named.index
    with pytest.raises(ValueError, match="unknown classifier"):
        audit(other, **given, classifier="c")


def test_a_card_says_what_it_lacks(models):
    w_star, row, others = models
    bare = audit(row, original=w_star, forget=FORGET, remain=REMAIN)
    assert [line.split(",")[0].split(" there")[0] for line in bare.missing] == [
        "Without a retrained model",
        "RMIA of a class needs models that saw half of it",
        "Without test images of the same classes",
        "The linear probe needs whole classes",
        "How soon it comes back was not asked: `relearn` says how w* was trained.",
    ]
    assert bare.table[["low", "position"]].isna().all(axis=None)
    ways = {"tests": TESTS, "retrained": others[:1]}
    one = audit(row, original=w_star, forget=FORGET, remain=REMAIN, **ways)
    assert any("no more than their values" in line for line in one.missing)
    assert one.table.loc["ToW", "w_star"] < 0.2 < one.table.loc["ToW", "model"]
    with pytest.raises(ValueError, match="the model can't take the inputs of `remain`"):
        audit(row, original=w_star, forget=FORGET, remain=[(torch.zeros(3, 2), torch.zeros(3))])


@pytest.fixture(scope="module")
def sampled():
    "w* that learned 40 images by heart, and four that never saw them."
    x = torch.randn(360, 1, 6, 6, generator=torch.Generator().manual_seed(7))
    (x, new), y, gone = x.split([160, 200]), torch.arange(200) % 4, torch.arange(160) < 40
    every, y = cut(new, y, y >= 0), y[:160]
    w_star, *others = (net(seed) for seed in range(10, 15))
    long = TrainSettings(Schedule(lr=0.05, epochs=60, drops=(50,)), batch_size=32, select="last")
    train_model(w_star, cut(x, y, y >= 0), long, progress="none")
    for other in others:
        train_model(other, cut(x, y, ~gone), long, progress="none")
    return w_star, others, cut(x, y, gone), cut(x, y, ~gone), every


def test_samples_are_set_against_images_that_nobody_saw(sampled):
    w_star, others, forget, remain, every = sampled
    given = {"original": w_star, "forget": forget, "remain": remain, "retrained": others}
    themselves = [part for x, y in forget for part in zip(x.flip(0).split(7), y.flip(0).split(7))]
    card = audit(others[0], **given, tests={"forget": themselves, "remain": every})
    table = card.table
    assert table.w_star["membership by loss, area"] > 0.8  # not the images beside themselves
    assert table.w_star["membership by RMIA, area"] > 0.8
    assert (
        0.3 < table.low["membership by RMIA, area"] <= table.high["membership by RMIA, area"] < 0.7
    )
    # nor do they count twice, in ToW or anywhere else
    assert table.equals(audit(others[0], **given, tests={"remain": every}).table)


def test_the_rmia_of_a_card_is_that_of_its_models(sampled):
    w_star, others, forget, remain, every = sampled
    given = {"original": w_star, "forget": forget, "remain": remain, "tests": {"remain": every}}
    table = audit(w_star, **given, retrained=others).table

    def p(model):
        sets = [answers_of(model, batches) for batches in (forget, every)]
        return [(-a.losses).exp() for a in [*balanced(sets), sets[1]]]

    def alone(k, outside, beside, population, rest):
        "The score of an unseen image among the others: it is left out where it stands."
        same = (population == outside[k]) & (rest == beside[:, k : k + 1]).all(0)
        assert same.sum() == 1
        keep = ~same
        return rmia(outside[k : k + 1], beside[:, k : k + 1], population[keep], rest[:, keep])[0]

    def found(target, references):
        inside, outside, population = p(target)
        theirs = [torch.stack(rows) for rows in zip(*map(p, references))]
        ins = rmia(inside, theirs[0], population, theirs[2])
        outs = [alone(k, outside, theirs[1], population, theirs[2]) for k in range(len(outside))]
        outs = torch.stack(outs)
        return roc_auc_score([1] * len(ins) + [0] * len(outs), torch.cat([ins, outs]))

    row = table.loc["membership by RMIA, area"]
    assert row.w_star == row.model == pytest.approx(found(w_star, others))
    left = [found(o, [r for r in others if r is not o]) for o in others]
    assert (row.low, row.high) == pytest.approx((min(left), max(left)))
    two = audit(w_star, **given, retrained=others[:2]).table.loc["membership by RMIA, area"]
    assert math.isnan(two.low) and two.model > 0.8  # each alone has one reference, which is too few
