"Whose images they are, and which of them a request means."

import pytest
import torch
from torch.utils.data import TensorDataset

from fisher_unlearn.images.data import load_images
from fisher_unlearn.images.sources import asked_for, digest_of, hashes_of, imported, places_of
from fisher_unlearn.images.sources import source_named, source_of

MODULE = """
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

X, Y = torch.randn(12, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3

def both():
    return TensorDataset(X[:9], Y[:9]), TensorDataset(X[9:], Y[9:]), ("ant", "bee", "cat")

def one():
    return TensorDataset(X, Y)

def stream():
    return iter([(X, Y)])

def unlabelled():
    return TensorDataset(X)

def few_names():
    return TensorDataset(X, Y), None, ("ant", "bee")

def fails():
    raise RuntimeError("no images\\nhere")

def empty_test():
    return TensorDataset(X, Y), TensorDataset(X[:0], Y[:0])

class Each(Dataset):
    def __init__(self, item):
        self.item = item

    def __len__(self):
        return 12

    def __getitem__(self, place):
        return self.item(place)

def failing(place):
    raise OSError(f"no file {place}")

def noisy():
    return Each(lambda place: (X[place] + torch.rand(3, 4, 4), place % 3))

def pictures():
    return Each(lambda place: (Image.new("RGB", (4, 4)), place % 3))

def two_sizes():
    return Each(lambda place: (X[place, :, : 3 + place % 2], place % 3))

def unreadable():
    return Each(failing)

def negative():
    return TensorDataset(X, Y - 1), None, ("0", "1")

def listed():
    return [TensorDataset(X[:9], Y[:9]), TensorDataset(X[9:], Y[9:]), ("ant", "bee", "cat")]

def named_by_an_array():
    return TensorDataset(X, Y), None, np.array(["ant", "bee", "cat"])

def four_parts():
    return (TensorDataset(X, Y),) * 4

def three_sets():
    return (TensorDataset(X, Y),) * 3

def counted():
    return TensorDataset(X, Y), None, 3

def silent():
    raise RuntimeError

def with_a_sibling():
    from beside_SIBLING import images
    return images()

def with_a_sibling_in_each():
    def item(place):
        from within_SIBLING import labelled
        return labelled(X[place], place % 3)
    return Each(item)

number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    "A module in the working folder, by a name that no other test has."
    monkeypatch.chdir(tmp_path)
    name = f"mine_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE.replace("SIBLING", name), encoding="utf-8")
    (tmp_path / f"beside_{name}.py").write_text(
        f"from {name} import one as images", encoding="utf-8"
    )
    (tmp_path / f"within_{name}.py").write_text(
        "def labelled(x, y):\n    return x, y", encoding="utf-8"
    )
    return name


@pytest.fixture(scope="module")
def digits():
    return source_of(load_images("digits"))


def test_a_function_gives_data_sets(module):
    source = source_named(f"{module}:both")
    assert (len(source.train), len(source.test), source.classes) == (9, 3, ("ant", "bee", "cat"))
    asked = asked_for(source, classes=["bee"])
    inputs, labels = next(iter(source.train.batches(asked.forget)))
    assert labels.tolist() == [1, 1, 1] and inputs.shape == (3, 3, 4, 4)
    alone = source_named(f"{module}:one")
    assert alone.test is None and alone.classes == ("0", "1", "2")
    listed = source_named(f"{module}:listed")
    assert (len(listed.train), len(listed.test), listed.classes) == (9, 3, ("ant", "bee", "cat"))
    assert source_named(f"{module}:named_by_an_array").classes == ("ant", "bee", "cat")


@pytest.mark.parametrize("name", ["with_a_sibling", "with_a_sibling_in_each"])
def test_a_function_may_import_what_lies_beside_it_when_it_is_called(module, name):
    assert len(source_named(f"{module}:{name}").train) == 12


def test_reading_labels_moves_nobodys_generator(module):
    before = torch.get_rng_state()
    source_named(f"{module}:both")
    assert torch.equal(before, torch.get_rng_state())


def test_a_data_set_is_read_in_a_new_order_each_time_where_it_is_trained_on(module):
    part = source_named(f"{module}:one").train
    every = torch.arange(12)
    plain = [labels.tolist() for _, labels in part.batches(every, 12)]
    loader = part.batches(every, 12, seed=3)
    first, second = ([labels.tolist() for _, labels in loader] for _ in range(2))
    again = [labels.tolist() for _, labels in part.batches(every, 12, seed=3)]
    assert first != second and first == again and sorted(first[0]) == sorted(plain[0])


WRONG = {
    "must be a data set with a length": "stream",
    "must yield (inputs, labels)": "unlabelled",
    "has the label 2, but 2 classes": "few_names",
    "did you mean 'both'?": "bot",
    "can't be had (no images here)": "fails",
    "can't be had (RuntimeError)": "silent",
    "the test images are empty": "empty_test",
    "the training images come differently at each reading": "noisy",
    "the training images can't be read (default_collate": "pictures",
    "the training images can't be read (stack expects": "two_sizes",
    "the training images can't be read (no file 0): each item": "unreadable",
    "has the label -1": "negative",
    "has 4 parts": "four_parts",
    "the classes are a TensorDataset": "three_sets",
    "the classes are a int": "counted",
}


@pytest.mark.parametrize("message", WRONG)
def test_functions_that_give_something_else(module, message):
    with pytest.raises((ValueError, TypeError)) as refused:
        source_named(f"{module}:{WRONG[message]}")
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_the_path_of_python_is_as_before(module):
    import sys

    before = list(sys.path)
    imported(f"{module}:one")
    with pytest.raises(ValueError, match="can't be imported"):
        imported("no_such_module_here:f")
    with pytest.raises(ValueError, match="no function|did you mean|unknown function"):
        imported(f"{module}:number")
    assert sys.path == before


@pytest.mark.parametrize("name", ["nowhere/photos", "./photos", "/none/photos"])
def test_a_folder_that_is_not_there(name):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        source_named(name)


@pytest.mark.parametrize("given", [{"size": 64}, {"test": "x"}, {"mean": (0.5,)}, {"channels": 1}])
def test_what_is_for_folders_is_refused_for_what_is_none(module, given):
    ((name, value),) = given.items()
    for data in ("digits", f"{module}:one"):
        with pytest.raises(ValueError, match=f"`{name}` is .*{data} is no folder of images"):
            source_named(data, **given)
    usual = {"size": 32, "channels": 3, "mean": (0.0,), "std": (1.0,), "test": None}
    assert len(source_named(f"{module}:one", **usual).train) == 12


def test_a_name_that_is_nothing():
    with pytest.raises(ValueError, match="did you mean 'digits'?"):
        source_named("digit")


def test_requests_are_named_in_one_way_and_leave_something(digits):
    labels = digits.train.labels
    asked = asked_for(digits, classes=["3", 4])
    assert asked.classes == (3, 4) and set(labels[asked.forget].tolist()) == {3, 4}
    assert len(asked.forget) + len(asked.remain) == len(labels)
    assert not {3, 4} & set(labels[asked.remain].tolist())
    assert asked_for(digits, samples=[5, 2, 5]).forget.tolist() == [2, 5]
    for given, said in {
        "nothing is named": {},
        "`classes` and `samples` are given": {"classes": [1], "samples": [2]},
        "that needs no method": {"classes": list(range(10))},
        "class 10 does not exist": {"classes": [10]},
        "unknown class 'cat'": {"classes": ["cat"]},
        "sample -1 does not exist": {"samples": [-1]},
        "has no files": {"files": ["a.png"]},
    }.items():
        with pytest.raises(ValueError) as refused:
            asked_for(digits, **said)
        assert given in str(refused.value)


def test_images_are_found_again_by_their_hashes(digits):
    asked = asked_for(digits, samples=[7, 100, 3])
    marks = hashes_of(digits.train, asked.forget)
    assert places_of(digits.train, marks).tolist() == [3, 7, 100]
    assert digest_of(marks) == digest_of(marks[::-1]) != digest_of(marks[:2])
    held = digits.train.held[torch.tensor([100, 50, 3])]
    moved = source_of(load_images("digits")).train.__class__(held, held.labels)
    assert places_of(moved, marks).tolist() == [0, 2]


def test_a_hash_covers_the_label():
    x = torch.zeros(2, 3)
    part = type(source_of(load_images("digits")).train)
    one, other = hashes_of(
        part(TensorDataset(x, torch.tensor([0, 1])), torch.tensor([0, 1])), torch.arange(2)
    )
    assert one != other
