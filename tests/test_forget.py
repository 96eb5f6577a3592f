"""Requests: a partition of the training set, checked against plain sets."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fisher_unlearn.data import load_images
from fisher_unlearn.forget import forget_class, forget_classes, forget_samples

DIGITS = load_images("digits")


@given(st.sets(st.integers(0, 9), min_size=1, max_size=9))
@settings(max_examples=20)
def test_classes_split_training_and_test_set(classes):
    request = forget_classes(DIGITS, sorted(classes))
    labels = DIGITS.train.labels.tolist()
    assert request.forget_indices.tolist() == [i for i, y in enumerate(labels) if y in classes]
    assert request.remain_indices.tolist() == [i for i, y in enumerate(labels) if y not in classes]
    assert torch.equal(request.forget.images, DIGITS.train.images[request.forget_indices])
    assert set(request.test_forget.labels.tolist()) == classes and not set(request.test_remain.labels.tolist()) & classes
    assert len(request.test_forget) + len(request.test_remain) == 500


@given(st.sets(st.integers(0, 1296), min_size=1, max_size=50))
@settings(max_examples=20)
def test_samples_leave_and_the_test_set_stays(indices):
    request = forget_samples(DIGITS, list(indices))
    assert request.forget_indices.tolist() == sorted(indices) and len(request.remain) == 1297 - len(indices)
    assert not set(request.remain_indices.tolist()) & indices
    assert torch.equal(request.test_forget.images, request.forget.images) and request.test_remain is DIGITS.test


def test_digests_tell_requests_apart():
    digests = {forget_class(DIGITS, k).digest for k in range(10)} | {forget_samples(DIGITS, [k]).digest for k in range(5)}
    assert len(digests) == 15
    whole_class = forget_class(DIGITS, 0)
    assert forget_samples(DIGITS, whole_class.forget_indices).digest != whole_class.digest  # other test sets
    assert forget_class(DIGITS.subset(1000, 0), 0).digest != whole_class.digest


@pytest.mark.parametrize("bad, message", [(10, "has the classes 0 to 9"), (-1, "class -1 does not exist"), ("zero", "unknown class 'zero'")])
def test_classes_that_do_not_exist_are_refused(bad, message):
    with pytest.raises(ValueError, match=message): forget_class(DIGITS, bad)


def test_what_is_no_position_and_no_class_is_refused():
    with pytest.raises(TypeError): forget_class(DIGITS, .5)
    with pytest.raises(TypeError, match="whole numbers"): forget_samples(DIGITS, [1.5])
    with pytest.raises(TypeError, match="whole numbers"): forget_samples(DIGITS, torch.ones(1297, dtype=torch.bool))


@pytest.mark.parametrize("bad, message", [([], "empty"), ([0, 0], "named twice"), ([-1], "sample -1 does not exist"), (range(1297), "remain set is empty")])
def test_samples_that_make_no_request_are_refused(bad, message):
    with pytest.raises(ValueError, match=message): forget_samples(DIGITS, bad)
