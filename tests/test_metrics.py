"""Accuracies against scikit-learn's, and the unlearn score against the paper's arithmetic."""
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import accuracy_score, recall_score

from fisher_unlearn.metrics import accuracy, accuracy_by_class, best_epoch, count_correct, evaluate, unlearn_score


def test_accuracies_are_scikit_learns(original, digits):
    batches = digits.test.batches(64)
    with torch.inference_mode():
        predicted = torch.cat([original.eval()(x).argmax(1) for x, _ in batches]).numpy()
    truth = digits.test.labels.numpy()
    assert accuracy(original, batches) == pytest.approx(100 * accuracy_score(truth, predicted))
    assert np.allclose(accuracy_by_class(original, batches), 100 * recall_score(truth, predicted, average=None))


def test_pooled_accuracy_is_that_of_the_union(original, digits, request_zero):
    sets = {"remain": request_zero.test_remain.batches(100), "forget": request_zero.test_forget.batches(100)}
    measured = evaluate(original, sets)
    assert measured["accuracy"] == pytest.approx(accuracy(original, digits.test.batches(500)))
    assert set(measured) == {"remain_acc", "forget_acc", "accuracy"} and evaluate(original, {}) == {}


def test_evaluation_leaves_the_model_as_it_was(original, digits):
    original.train()
    before = {k: v.clone() for k, v in original.state_dict().items()}
    count_correct(original, digits.test.batches(100))
    assert original.training and all(torch.equal(v, before[k]) for k, v in original.state_dict().items())


def test_classes_without_images_have_no_accuracy(original, request_zero):
    by_class = accuracy_by_class(original, request_zero.test_forget.batches(100))
    assert not np.isnan(by_class[0]) and by_class[1:].isna().all()


def test_stray_labels_and_no_images_are_refused(original):
    with pytest.raises(ValueError, match="2 labels are outside the model's classes 0 to 9"): accuracy(original, [(torch.zeros(3, 1, 8, 8), torch.tensor([0, 10, -1]))])
    with pytest.raises(ValueError, match="no images"): accuracy(original, [])


@pytest.mark.parametrize("remain, forget, score", [(85.9, 63.5, 52.5), (86.2, 0.0, 86.2), (79.7, 83.6, 43.4), (0, 50, 0), (100, 0, 100)])
def test_unlearn_scores_of_table_1(remain, forget, score):
    assert unlearn_score(remain, forget) == pytest.approx(score, abs=.06)


def test_the_best_epoch_is_the_first_best_after_fine_tuning_began():
    history = pd.DataFrame({"epoch": [0, 1, 2, 3], "unlearn_score": [90., 50., 70., 70.], "accuracy": [1., 2., 3., 4.]})
    assert best_epoch(history).epoch == 2 and best_epoch(history, "accuracy").epoch == 3 and best_epoch(history[:1]).epoch == 0
