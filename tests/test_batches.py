"""Anyone's batches become inputs and whole labels, or one sentence."""

from collections import UserDict, namedtuple

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from fisher_unlearn.images.batches import as_one, first_pair, pairs, read_pair
from fisher_unlearn.images.data import load_images

X = torch.randn(4, 3)
Y = torch.tensor([0, 2, 1, 0])
Batch = namedtuple("Batch", "inputs labels")


@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int16", "int32", "int64", "uint16", "float16", "float32", "float64"]
)
@pytest.mark.parametrize("column", [False, True])
def test_whole_labels_of_any_type_are_labels(dtype, column):
    for labels in (Y.to(getattr(torch, dtype)), Y.numpy().astype(dtype)):
        labels = labels[:, None] if column else labels
        inputs, read = read_pair((X, labels))
        assert inputs is X
        assert read.dtype == torch.int64
        assert torch.equal(read, Y)


def test_our_own_tensors_are_handed_on_as_they_are():
    inputs, labels = read_pair([X, Y])
    assert inputs is X
    assert labels is Y


@pytest.mark.parametrize(
    "batch",
    [
        (X, Y.tolist()),
        [X, tuple(Y)],
        Batch(X, Y),
        (X, Y, torch.arange(4)),
        (X, Y, ["a", "b", "c", "d"]),
        (X, Y, None, 3),
        (X, Y, torch.randn(4, 7)),
        {"x": X, "y": Y},
        UserDict(pixel_values=X, labels=Y),
        {"image": X, "target": Y, "path": list("abcd")},
        {"inputs": X, "label": Y.int(), "idx": torch.arange(4)},
        (X.numpy(), Y.numpy()),
        (X.double().numpy()[::-1][::-1], Y.numpy()[::-1][::-1]),
    ],
)
def test_pairs_triples_mappings_and_arrays_are_served(batch):
    inputs, labels = read_pair(batch)
    assert torch.equal(inputs, X)
    assert inputs.dtype == torch.float32
    assert torch.equal(labels, Y)


def test_an_array_that_may_not_be_written_is_read_without_a_warning(recwarn):
    array = X.numpy().copy()
    array.flags.writeable = False
    assert torch.equal(read_pair((array, Y))[0], X)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (X, "`forget` yields a Tensor: it must yield"),
        ((X,), "`forget` yields 1 item a batch"),
        (((X, X), Y), "the inputs of `forget` are a tuple: they must be one tensor"),
        ((["a", "b"], [0, 1]), "the inputs of `forget` are a list"),
        ((X, None), "the labels of `forget` are a NoneType"),
        ((X, list("abcd")), "the labels of `forget` can't be made one tensor"),
        ((X, Y[:1]), "must yield 4 integer labels with 4 inputs, not torch.int64"),
        ((X, torch.eye(4) / 2), "with the value 0.5"),
        ((X, torch.eye(4)[:3]), "must yield 4 integer labels"),
        ((X, Y + 0.5), "`forget` yields the label 0.5"),
        ((X, torch.tensor([0, 1, torch.nan, 2])), "`forget` yields the label nan"),
        ((X, torch.tensor([0, 1, torch.inf, 2])), "`forget` yields the label inf"),
        ((X, Y.to(torch.complex64)), "must yield 4 integer labels"),
        ((torch.tensor(1.0), Y), "yields a single number"),
        ((X, Y, torch.rand(4)), "weights of samples"),
        ((X, Y, np.ones(4)), "weights of samples"),
        ((X, Y, torch.rand(4, 1)), "weights of samples"),
        ((X, Y, np.ones((4, 1))), "weights of samples"),
        ((X, Y, Y, torch.tensor(0.3)), "weights of samples"),
        ((X, Y, Y, 0.3), "weights of samples"),
        ((X, Y, Y, np.float32(0.3)), "weights of samples"),
        ((X, 3, torch.rand(4)), "weights of samples"),
        ((X, 3, torch.rand(4, 2)), "the labels of `forget` are a int"),
        ({}, "a mapping with no keys"),
        ({"a": X, "b": Y}, "which are the inputs isn't clear"),
        ({"x": X, "image": X, "y": Y}, "which are the inputs isn't clear"),
        ({"x": X}, "which are the labels isn't clear"),
        (
            {"input_ids": X.long(), "attention_mask": X, "labels": Y},
            "'attention_mask' beside inputs and labels",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_is_not_clear_is_one_sentence(batch, message):
    with pytest.raises((TypeError, ValueError), match=message.replace("(", r"\(")) as error:
        read_pair(batch, "forget")
    assert "\n" not in str(error.value)


def test_empty_batches_are_passed_over():
    assert len(list(pairs([(X[:0], Y[:0]), (X, Y), (X[:0], [])]))) == 1
    assert torch.equal(first_pair([(X[:0], Y[:0]), (X, Y)])[0], X)
    for empty in ([], [(X[:0], Y[:0])]):
        with pytest.raises(ValueError, match="`remain` is empty: it yields no batch"):
            first_pair(empty, "remain")


def test_a_dataloader_and_our_batches_are_read_as_they_are():
    loader = DataLoader(TensorDataset(X, Y.int()), 3)
    assert [len(y) for _, y in pairs(loader)] == [3, 1]
    ours = load_images("digits").test.batches(200)
    assert all(
        torch.equal(a, b) and torch.equal(c, d)
        for (a, c), (b, d) in zip(ours, pairs(ours), strict=True)
    )


def test_batches_become_one_unless_their_inputs_differ_in_shape():
    inputs, labels = as_one([(X, Y), (X[:1] + 1, Y[:1])])
    assert inputs.tolist() == [*X.tolist(), (X[0] + 1).tolist()]
    assert labels.tolist() == [0, 2, 1, 0, 0]
    with pytest.raises(ValueError, match=r"of the shapes \(3,\) and \(2,\), .*: make all") as error:
        as_one([(X, Y), (X[:, :2], Y), (X, Y)])
    assert "\n" not in str(error.value)
