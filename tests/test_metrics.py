"""Accuracies and loss against scikit-learn's, and scores, windows and averages against the
paper's arithmetic."""

import statistics

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss, recall_score
from torch import nn

from fisher_unlearn.networks.metrics import (
    accuracy,
    accuracy_by_class,
    best_epoch,
    count_correct,
    evaluate,
    fluctuation,
    mean_and_deviation,
    mean_loss,
    unlearn_score,
)


def test_accuracies_are_scikit_learns(original, digits):
    batches = digits.test.batches(64)
    with torch.inference_mode():
        predicted = torch.cat([original.eval()(x).argmax(1) for x, _ in batches]).numpy()
    truth = digits.test.labels.numpy()
    assert accuracy(original, batches) == pytest.approx(100 * accuracy_score(truth, predicted))
    assert np.allclose(
        accuracy_by_class(original, batches), 100 * recall_score(truth, predicted, average=None)
    )


def test_pooled_accuracy_is_that_of_the_union(original, digits, request_zero):
    sets = {
        "remain": request_zero.test_remain.batches(100),
        "forget": request_zero.test_forget.batches(100),
    }
    measured = evaluate(original, sets)
    assert measured["accuracy"] == pytest.approx(accuracy(original, digits.test.batches(500)))
    assert (
        set(measured) == {"remain_acc", "forget_acc", "accuracy"} and evaluate(original, {}) == {}
    )


def test_evaluation_leaves_the_model_as_it_was(original, digits):
    original.train()
    before = {k: v.clone() for k, v in original.state_dict().items()}
    count_correct(original, digits.test.batches(100))
    assert original.training and all(
        torch.equal(v, before[k]) for k, v in original.state_dict().items()
    )


def test_classes_without_images_have_no_accuracy(original, request_zero):
    by_class = accuracy_by_class(original, request_zero.test_forget.batches(100))
    assert not np.isnan(by_class[0]) and by_class[1:].isna().all()


def test_stray_labels_and_no_images_are_refused(original):
    with pytest.raises(ValueError, match="2 labels are outside the model's classes 0 to 9"):
        accuracy(original, [(torch.zeros(3, 1, 8, 8), torch.tensor([0, 10, -1]))])
    with pytest.raises(ValueError, match="no images"):
        accuracy(original, [])


@pytest.mark.parametrize(
    "remain, forget, score",
    [(85.9, 63.5, 52.5), (86.2, 0.0, 86.2), (79.7, 83.6, 43.4), (0, 50, 0), (100, 0, 100)],
)
def test_unlearn_scores_of_table_1(remain, forget, score):
    assert unlearn_score(remain, forget) == pytest.approx(score, abs=0.06)


def test_the_best_epoch_is_the_first_best_after_fine_tuning_began():
    history = pd.DataFrame(
        {
            "epoch": [0, 1, 2, 3],
            "unlearn_score": [90.0, 50.0, 70.0, 70.0],
            "accuracy": [1.0, 2.0, 3.0, 4.0],
        }
    )
    assert (
        best_epoch(history).epoch == 2
        and best_epoch(history, "accuracy").epoch == 3
        and best_epoch(history[:1]).epoch == 0
    )


@pytest.mark.parametrize("window, wanted", [("fine_tuning", 2), ("authors_code", 0), ("last", 5)])
def test_each_window_has_its_own_best_epoch(window, wanted):
    history = pd.DataFrame(
        {"epoch": range(6), "unlearn_score": [96.0, 50.0, 95.0, 70.0, 95.0, 60.0]}
    )
    assert best_epoch(history, window=window).epoch == wanted


def test_the_authors_window_ends_before_the_last_epoch():
    "The first S of S + 1 entries: the best of all, in epoch 5, is outside."
    history = pd.DataFrame(
        {"epoch": range(6), "unlearn_score": [10.0, 20.0, 30.0, 40.0, 30.0, 50.0]}
    )
    assert best_epoch(history, window="authors_code").epoch == 3 and best_epoch(history).epoch == 5


@pytest.mark.parametrize("window", ["fine_tuning", "authors_code", "last"])
def test_a_history_without_fine_tuning_has_one_row_to_choose(window):
    assert (
        best_epoch(pd.DataFrame({"epoch": [0], "unlearn_score": [3.0]}), window=window).epoch == 0
    )


def test_unknown_windows_and_columns_are_refused():
    history = pd.DataFrame({"epoch": range(3), "unlearn_score": [1.0, 2.0, 3.0]})
    with pytest.raises(
        ValueError,
        match="`window` is 'first' .did you mean 'last'..: it must be 'fine_tuning' or "
        "'authors_code' or 'last'",
    ):
        best_epoch(history, window="first")
    with pytest.raises(ValueError, match="did you mean 'unlearn_score'"):
        best_epoch(history, "unlearn score")
    with pytest.raises(ValueError, match="`window` is 'last'"):
        fluctuation(history, "unlearn_score", "last")
    with pytest.raises(ValueError, match="did you mean 'unlearn_score'"):
        fluctuation(history, "score")


@pytest.mark.parametrize("last", [2, 5, 30])
def test_fluctuation_is_the_formula_of_table_2(last):
    values = np.random.default_rng(last).uniform(0, 100, last + 1)
    history, total = (
        pd.DataFrame({"epoch": range(last + 1), "acc": values}, index=range(7, last + 8)),
        0.0,
    )
    for t in range(1, last + 1):
        if t == last:
            assert fluctuation(history, "acc", "authors_code") == pytest.approx(total / (last - 1))
        total += abs(values[t] - values[t - 1])
    assert fluctuation(history, "acc") == pytest.approx(total / (last - 1))


def test_fluctuation_follows_table_1_where_one_step_dominates():
    """FisherNoise: the first epoch repairs about 38 points of remain accuracy, and Table 2
    prints 9.8."""
    history = pd.DataFrame({"epoch": range(6), "remain_acc": [45.0, 83.0, 83.0, 83.0, 83.0, 83.0]})
    assert (
        fluctuation(history, "remain_acc")
        == fluctuation(history, "remain_acc", "authors_code")
        == pytest.approx(38 / 4)
    )


@pytest.mark.parametrize("epochs", [[0], [0, 1], [1, 2, 3], [0, 1, 3], [2, 1, 0]])
def test_fluctuation_needs_all_epochs_and_two_of_fine_tuning(epochs):
    with pytest.raises(
        ValueError, match=r"needs the epochs 0 to S in order, with S of 2 or more, not \["
    ):
        fluctuation(pd.DataFrame({"epoch": epochs, "acc": 1.0}), "acc")


@pytest.mark.parametrize(
    "values, mean, deviation",
    [([0, 4, 4], 2.7, 1.9), ([0, 0, 33.0], 11.0, 15.6), ([100, 100, 64.5], 88.2, 16.7)],
)
def test_means_and_deviations_of_the_paper(values, mean, deviation):
    found = mean_and_deviation(pd.Series(values)).iloc[0]
    assert [found["mean"], found.deviation, found.n] == pytest.approx(
        [mean, deviation, 3], abs=0.05
    )
    assert found.deviation == pytest.approx(statistics.pstdev(values))


def test_one_row_for_each_column_and_no_number_where_a_run_has_none():
    runs = pd.DataFrame(
        {"acc": [1.0, 3.0], "epochs": [2, None]}, index=["seed 1", "seed 2"], dtype=object
    )
    found = mean_and_deviation(runs)
    assert found.loc["acc"].tolist() == [2, 1, 2]
    assert found.loc["epochs", ["mean", "deviation"]].isna().all() and found.loc["epochs", "n"] == 1
    assert mean_and_deviation(runs[:1]).loc["acc"].tolist() == [1, 0, 1]


@pytest.mark.parametrize("size", [64, 500])
def test_the_loss_is_scikit_learns_whatever_the_batches(original, digits, size):
    original.train()
    with torch.inference_mode():
        logits = torch.cat([original.eval()(x) for x, _ in digits.test.batches(64)])
    wanted = log_loss(
        digits.test.labels.numpy(), logits.double().softmax(1).numpy(), labels=range(10)
    )
    original.train()
    assert (
        mean_loss(original, digits.test.batches(size)) == pytest.approx(wanted, rel=1e-6)
        and original.training
    )


def test_tiny_losses_keep_their_digits():
    "float32 would say 0 for a loss of e^-20, since the probability rounds to 1."
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[20.0, 0.0], [0.0, 0.0]]))
    assert mean_loss(model, [(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))]) == pytest.approx(
        np.log1p(np.exp(-20.0)), rel=1e-6
    )


@pytest.mark.parametrize("stray", [10, -1, -100])
def test_the_loss_refuses_stray_labels_and_no_images(original, stray):
    "-100 would be left out quietly by PyTorch."
    with pytest.raises(ValueError, match="but the model has 10 classes"):
        mean_loss(original, [(torch.zeros(2, 1, 8, 8), torch.tensor([0, stray]))])
    with pytest.raises(ValueError, match="no images"):
        mean_loss(original, [])


# ---- a broken model has no accuracy


def broken_net(value, where=slice(None)):
    "A network whose answers have the value `value` for the classes `where`."
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    with torch.no_grad():
        model[1].bias[where] = value
    return model


def some_images(n=6):
    return [
        (torch.ones(n // 2, 4), torch.zeros(n // 2, dtype=torch.long)),
        (torch.ones(n // 2, 4), torch.ones(n // 2, dtype=torch.long)),
    ]


MEASURES = {
    "count_correct": count_correct,
    "accuracy": accuracy,
    "accuracy_by_class": accuracy_by_class,
    "mean_loss": mean_loss,
    "evaluate": lambda model, batches: evaluate(model, {"remain": batches}),
}


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(
    "value, where",
    [
        (np.nan, slice(None)),
        (np.nan, 1),
        (np.nan, 2),
        (np.inf, slice(None)),
        (np.inf, 1),
        (-np.inf, slice(None)),
    ],
)
def test_a_model_whose_answers_are_no_numbers_has_no_measure(measure, value, where):
    "The largest of such answers is that of class 0: forget accuracy 0, remain accuracy 100."
    with pytest.raises(
        FloatingPointError, match="the logits of the model are not finite for 6 of 6 images"
    ) as error:
        MEASURES[measure](broken_net(value, where), some_images())
    assert "\n" not in str(error.value)


def test_one_broken_answer_of_many_is_enough_and_the_set_is_named():
    model, (first, second) = broken_net(0.0), some_images()
    first[0][1] = np.nan
    with pytest.raises(
        FloatingPointError, match="the set 'forget' can't be measured: .* for 1 of 6 images"
    ):
        evaluate(model, {"remain": [second], "forget": [second, first]})


def test_a_class_that_is_ruled_out_is_an_answer():
    assert accuracy(broken_net(-np.inf, 2), some_images()) >= 0


def test_measuring_leaves_caches_that_can_be_trained():
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.line, self.scale = nn.Linear(4, 3), None

        def forward(self, x):
            if self.scale is None:
                self.scale = torch.ones(1, device=x.device)
            return self.line(x) * self.scale

    for measure in MEASURES.values():
        model = Caching()
        measure(model, some_images())
        model(torch.ones(2, 4)).sum().backward()


def test_batches_without_images_are_none():
    with pytest.raises(ValueError, match="no images"):
        accuracy(broken_net(0.0), [(torch.ones(0, 4), torch.zeros(0, dtype=torch.long))])


class Moody(nn.Module):
    "A network that remembers, counts and replaces what it holds at each pass."

    def __init__(self):
        super().__init__()
        self.line, self.seen, self.last = nn.Linear(4, 3), 0, None
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x):
        self.seen, self.last, self.total = self.seen + 1, x, self.total + x.sum()
        return {"logits": self.line(x), "hidden": x}


@pytest.mark.parametrize("measure", MEASURES)
def test_a_foreign_network_is_measured_and_left_as_it_was(measure):
    """It returns a dictionary, its loader dictionaries of arrays, and it changes itself whenever
    it runs."""
    model = Moody().train()
    buffer, plain = model.total, nn.Sequential(model.line)
    loader = [{"inputs": x.numpy(), "labels": y.numpy().astype(np.int32)} for x, y in some_images()]
    found, wanted = MEASURES[measure](model, loader), MEASURES[measure](plain, some_images())
    assert (
        np.array_equal(np.asarray(pd.Series(found)), np.asarray(pd.Series(wanted)), equal_nan=True)
        if not torch.is_tensor(found)
        else torch.equal(found, wanted)
    )
    assert (
        model.training
        and model.seen == 0
        and model.last is None
        and model.total is buffer
        and buffer == 0
    )


def test_measures_check_their_arguments(original):
    for bad in (
        lambda: accuracy(3, []),
        lambda: accuracy(original, "ab"),
        lambda: accuracy(original, 3),
        lambda: accuracy(original, [3]),
        lambda: evaluate(original, [some_images()]),
        lambda: evaluate(original, {3: some_images()}),
        lambda: unlearn_score("a", 3),
        lambda: unlearn_score(True, 3),
        lambda: best_epoch(3),
        lambda: best_epoch(pd.DataFrame()),
        lambda: best_epoch(pd.DataFrame({"epoch": [0], "unlearn_score": [np.nan]})),
        lambda: best_epoch(pd.DataFrame({"a": [1]})),
        lambda: fluctuation(3, "a"),
        lambda: mean_and_deviation([3]),
        lambda: mean_and_deviation(pd.Series(["a"])),
        lambda: count_correct(original, batchs=[]),
    ):
        with pytest.raises((TypeError, ValueError)) as error:
            bad()
        assert "\n" not in str(error.value) and str(error.value).endswith(".")
