"""Samples of several classes: labels in columns, each of which says yes or no."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fisher_unlearn import unlearn
from fisher_unlearn.images.batches import read_pair
from fisher_unlearn.images.overlap import overlap
from fisher_unlearn.images.sources import source_named
from fisher_unlearn.methods.unlearn import METHODS
from fisher_unlearn.networks.metrics import accuracy, accuracy_by_class, mean_loss
from fisher_unlearn.networks.schedule import Schedule
from fisher_unlearn.networks.train import TrainSettings, train_model
from fisher_unlearn.scores.fisher import diag_fisher, naive_diag_fisher

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(60, 1, 6, 6, generator=GENERATOR)
Y = torch.stack([X.mean((1, 2, 3)) > 0, X[:, 0, 0, 0] > 0, X[:, 0, 1, 1] > 0], 1).float()
TRAIN = TrainSettings(
    Schedule(lr=0.1, epochs=20, drops=()), loss="binary_cross_entropy", select="last"
)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def batches(where=slice(None), x=X, y=Y, size=8):
    return DataLoader(TensorDataset(x[where], y[where]), batch_size=size)


@pytest.mark.parametrize("dtype", ["bool", "int64", "uint8", "float32", "float64"])
def test_zeros_and_ones_of_any_type_are_columns(dtype):
    read = read_pair((X, Y.to(getattr(torch, dtype))))[1]
    assert read.dtype == torch.float32 and torch.equal(read, Y)
    assert torch.equal(read_pair({"x": X, "y": Y.numpy().astype(dtype)})[1], Y)


@pytest.mark.parametrize("odd", [0.5, -1.0, 2.0, torch.nan, torch.inf])
def test_what_is_neither_yes_nor_no_is_refused(odd):
    spoiled = Y.clone()
    spoiled[3, 1] = odd
    with pytest.raises(ValueError, match=r"labels of the shape \(60, 3\) with the value"):
        read_pair((X, spoiled))


@pytest.mark.parametrize(
    ("labels", "per"), [("true", "sample"), ("true", "batch"), ("expected", "sample")]
)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_fisher_information_is_that_of_the_loops_over_all_answers(labels, per, reduction):
    "The oracle goes through all 2³ answers, each with its probability."
    model, data = net().double(), batches(slice(0, 11), X.double(), Y, 4)
    found = diag_fisher(model, data, labels, per, reduction)
    for name, wanted in naive_diag_fisher(model, data, labels, per, reduction).items():
        assert torch.allclose(found[name], wanted, rtol=1e-9, atol=1e-12 * float(wanted.max()))


def test_fisher_information_is_the_square_of_the_slopes_of_torchs_loss():
    model, data = net().double(), batches(slice(0, 9), X.double(), Y, 4)
    wanted = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for x, y in zip(X[:9].double(), Y[:9].double()):
        model.zero_grad()
        F.binary_cross_entropy_with_logits(model(x[None]), y[None], reduction="sum").backward()
        for name, p in model.named_parameters():
            wanted[name] += p.grad**2
    found = diag_fisher(net().double(), data)
    assert all(torch.allclose(found[n], wanted[n]) for n in wanted)


def test_answers_are_drawn_from_the_model_and_their_mean_is_the_expectation():
    model, data = net(), batches(slice(0, 4))
    drawn = [diag_fisher(model, data, "sampled", seed=s) for s in range(400)]
    again = diag_fisher(model, data, "sampled", seed=0)
    assert all(torch.equal(drawn[0][n], again[n]) for n in again)
    expected = diag_fisher(model, data, "expected")
    for name, wanted in expected.items():
        mean = torch.stack([one[name] for one in drawn]).mean(0)
        assert (mean - wanted).abs().max() < 0.15 * wanted.max()


def test_logits_far_out_have_finite_information():
    class Far(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(2, 3)

        def forward(self, x):
            return 1e3 * self.head(x)

    x, y = torch.tensor([[1.0, -2.0], [3.0, 4.0]]), torch.tensor([[1, 0, 1], [0, 0, 1.0]])
    for labels in ("true", "sampled", "expected"):
        found = diag_fisher(Far(), [(x, y)], labels)
        assert all(score.isfinite().all() for score in found.values())


def test_expected_answers_per_batch_are_refused():
    with pytest.raises(ValueError, match="score these per sample"):
        diag_fisher(net(), batches(), "expected", "batch")


def test_a_right_column_is_a_right_answer():
    model, data = net(), batches(size=7)
    with torch.no_grad():
        right = ((model(X) > 0) == (Y > 0)).double()
    assert accuracy(model, data) == pytest.approx(100 * float(right.mean()))
    assert np.allclose(accuracy_by_class(model, data), 100 * right.mean(0))


def test_training_minimises_torchs_loss():
    model = net()
    history = train_model(model, batches(), TRAIN, progress="none")
    assert history.train_loss.iloc[-1] < 0.5 * history.train_loss.iloc[0]
    assert accuracy(model, batches()) > 90


def test_a_column_is_forgotten_and_the_others_stay():
    model = net()
    train_model(model, batches(), TRAIN, progress="none")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    gone = Y[:, 0] > 0
    sets = {"forget": batches(gone), "remain": batches(~gone)}
    tune = TRAIN.replayed(2)
    ways = {"ratio": 0.1, "fine_tune": tune, "evaluate": sets, "progress": "none"}
    result = unlearn(model, **sets, **ways, classes=(0,))
    assert result.changed.masked.sum() > 0 and len(result.history) == 3
    assert "unlearn_score" in result.history
    assert "unlearn_score" not in unlearn(model, **sets, **ways).history  # which class isn't known
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    row = unlearn(model, **sets, method="mask_classifier", classes=(0,), progress="none")
    with torch.no_grad():
        assert (row.model(X)[:, 0] == 0).all()


def test_a_class_of_which_samples_remain_is_no_whole_class():
    gone = slice(0, 20)
    found = overlap(batches(gone), batches(slice(20, 60)))
    assert found.shared == 0 and found.remain == 40
    assert dict(found.labels) == {c: int(Y[20:, c].sum()) for c in range(3)}
    with pytest.raises(ValueError, match="samples of class 1 are to remain"):
        unlearn(
            net(), batches(gone), batches(slice(20, 60)), method="mask_classifier", classes=(1,)
        )


@pytest.mark.parametrize("name", sorted(METHODS))
def test_each_method_serves_columns_or_says_why_not(name):
    model = net()
    train_model(model, batches(), TRAIN, progress="none")
    gone = Y[:, 0] > 0
    sets = {"forget": batches(gone), "remain": batches(~gone), "reference": batches()}
    sets["held_out"] = batches(gone)
    ways = {"method": name, "classes": (0,), "build": lambda: net(1), "progress": "none"}
    if "one_class" in METHODS[name].needs:
        with pytest.raises(ValueError, match=f"`{name}` needs samples of one class each"):
            unlearn(model, **sets, **ways)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = unlearn(model, **sets, **ways, fine_tune=TRAIN.replayed(1))
    assert all(p.isfinite().all() for p in result.model.parameters())


CROSS = TrainSettings(Schedule(lr=0.1, epochs=2, drops=()), select="last")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: train_model(net(), batches(), CROSS), 'loss="binary_cross_entropy"'),
        (
            lambda: unlearn(net(), batches(slice(9)), batches(slice(9, 60)), fine_tune=CROSS),
            'loss="binary_cross_entropy"',
        ),
        (lambda: mean_loss(net(), batches()), "several classes a sample"),
        (
            lambda: train_model(net(), batches(y=Y.argmax(1)), TRAIN),
            "the loss binary_cross_entropy can't be taken of logits",
        ),
        (
            lambda: train_model(net(), batches(y=Y[:, :2]), TRAIN),
            "labels of 2 columns, but the model has 3 classes",
        ),
        (lambda: accuracy(net(), batches(y=Y[:, :2])), "labels of 2 columns"),
        (lambda: diag_fisher(net(), batches(y=Y[:, :2])), "labels of 2 columns"),
    ],
)
def test_targets_that_no_loss_takes_are_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("loss", "message"),
    [(lambda logits, labels: logits, "gives"), (lambda logits, labels: 3.0, "gives float")],
)
def test_a_loss_that_is_no_number_is_one_sentence(loss, message):
    settings = TrainSettings(Schedule(epochs=1, drops=()), loss=loss, select="last")
    with pytest.raises(ValueError, match=message):
        train_model(net(), batches(), settings)


def test_a_deletion_points_to_what_serves_columns():
    with pytest.raises(ValueError, match="several classes each"):
        source_named(f"{__name__}:give")


def give():
    return TensorDataset(X, Y)
