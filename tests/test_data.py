"""Images, batches and data files: against torchvision's own transforms, and against damage."""

import gzip
import json
import math
import pickle
import struct

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchvision.transforms import v2

from fisher_unlearn.images import data
from fisher_unlearn.images.atomic import writable_folder
from fisher_unlearn.images.data import Samples, check_repeatable, choose, find_data, load_images
from fisher_unlearn.images.data import pad_or_resize


def made(n=12, channels=3, side=10, classes=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, channels, side, side), generator=g).to(
        torch.uint8
    ), torch.randint(classes, (n,), generator=g)


def prepared(folder, name="cifar10", classes=10, **change):
    "A small prepared file, with entries changed or (if None) left out."
    (x, y), (u, v) = made(12, classes=classes), made(6, classes=classes, seed=1)
    tensors = {"train_images": x, "train_labels": y, "test_images": u, "test_labels": v} | change
    save_file(
        {k: t for k, t in tensors.items() if t is not None},
        folder / f"{name}.safetensors",
        metadata={
            "classes": json.dumps([f"c{k}" for k in range(classes)]),
            "source": "made for a test",
            "lossy_tr": "[1, 2]",
        },
    )
    return folder / f"{name}.safetensors"


@pytest.mark.parametrize("side, size", [(28, 32), (32, 32), (64, 32), (8, 32)])
def test_batches_are_torchvisions_normalised_images(side, size):
    images, labels = made(5, 3, side)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    fitted = (
        v2.Pad((size - side) // 2)(images)
        if side < size
        else v2.Resize(size, antialias=True)(images)
    )
    wanted = v2.Normalize(mean, std)(v2.ToDtype(torch.float32, scale=True)(fitted))
    batches = Samples(images, labels, mean, std, size).batches(2)
    inputs = torch.cat([x for x, _ in batches])
    assert len(batches) == 3 and torch.allclose(inputs, wanted, atol=2e-6)
    assert torch.equal(torch.cat([y for _, y in batches]), labels)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 9))
def test_padding_and_resizing_always_gives_the_size_and_pads_with_black(height, width, size):
    images = torch.full((2, 1, height, width), 200, dtype=torch.uint8)
    fitted = pad_or_resize(images, size)
    assert fitted.shape == (2, 1, size, size) and fitted.dtype == torch.uint8
    if max(height, width) <= size:
        assert fitted.long().sum() == images.long().sum()


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 5))
def test_shuffled_batches_are_a_permutation_that_the_seed_fixes(n, size, seed):
    samples = Samples(
        torch.arange(n, dtype=torch.uint8).reshape(n, 1, 1, 1),
        torch.arange(n),
        (0.0,),
        (1 / 255,),
        1,
    )
    batches = samples.batches(size)
    once, again = (
        [y for _, y in batches.shuffled(torch.Generator().manual_seed(seed))] for _ in range(2)
    )
    assert len(once) == len(batches) and torch.equal(torch.cat(once), torch.cat(again))
    assert torch.cat(once).sort().values.tolist() == list(range(n))
    for x, y in batches.shuffled(torch.Generator().manual_seed(seed)):
        assert torch.allclose(x.flatten(), y.float(), atol=1e-4)


def test_digits_are_scikit_learns(digits):
    from sklearn.datasets import load_digits

    bunch = load_digits()
    ours = torch.cat([digits.train.images, digits.test.images]).flatten(1).double()
    theirs = torch.from_numpy(bunch.images).flatten(1) * 255 / 16
    assert sorted(map(tuple, (ours * 16 / 255).round().int().tolist())) == sorted(
        map(tuple, (theirs * 16 / 255).round().int().tolist())
    )
    assert digits.digest == load_images("digits").digest


def test_a_prepared_file_is_read_with_its_remarks(tmp_path):
    prepared(tmp_path)
    images = load_images("cifar10", tmp_path, download=False)
    assert (
        len(images.train) == 12
        and images.classes[3] == "c3"
        and images.remarks == {"lossy_tr": "[1, 2]"}
    )
    assert find_data(tmp_path).set_index("data set").state["cifar10"].startswith("prepared")


def test_a_subset_is_drawn_by_seed(digits):
    a, b, c = (digits.subset(100, seed) for seed in (1, 1, 2))
    assert (
        len(a.train) == 100 and a.digest == b.digest != c.digest and len(a.test) == len(digits.test)
    )
    with pytest.raises(ValueError, match="can't be drawn"):
        digits.subset(5000, 0)


def test_held_out_images_leave_the_training_set_and_the_test_set_plays_no_part(digits):
    a, b, c = (digits.held_out(100, seed) for seed in (1, 1, 2))
    assert (len(a.train), len(a.test)) == (
        1197,
        100,
    ) and a.digest == b.digest != c.digest != digits.digest
    rows = lambda part: sorted(
        bytes(image.numpy().tobytes()) + bytes([label])
        for image, label in zip(part.images, part.labels.tolist())
    )
    assert sorted(rows(a.train) + rows(a.test)) == rows(digits.train)
    for n in (0, 1297):
        pytest.raises(ValueError, digits.held_out, n, 0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"train_labels": None}, "not a whole prepared file"),
        ({"train_images": torch.zeros(12, 3, 10, 10)}, "must be uint8"),
        ({"train_labels": torch.zeros(11, dtype=torch.int64)}, "must be int64 of the shape"),
        (
            {"test_labels": torch.full((6,), 10)},
            "labels of cifar10 run from . to 10, but it has 10 classes",
        ),
    ],
)
def test_bad_prepared_files_are_refused(tmp_path, change, message):
    prepared(tmp_path, **change)
    with pytest.raises((ValueError, TypeError), match=message):
        load_images("cifar10", tmp_path, download=False)


def test_a_truncated_file_is_refused(tmp_path):
    path = prepared(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole prepared file"):
        load_images("cifar10", tmp_path, download=False)


def fake_mnist(root, damaged=False):
    "MNIST's files with a few made images; torchvision reads unpacked ones without checking them."
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 20), ("t10k", 10)):
        images, labels = (
            np.random.default_rng(0).integers(256, size=(n, 28, 28), dtype=np.uint8),
            np.arange(n, dtype=np.uint8) % 10,
        )
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 2051, n, 28, 28) + images.tobytes()
        )
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">II", 2049, n) + labels.tobytes()
        )
    if damaged:
        (raw / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"something else"))
    return raw


def test_mnist_is_built_once_from_torchvisions_files(tmp_path):
    raw = fake_mnist(tmp_path)
    images = load_images("mnist", tmp_path, download=False)
    theirs = torchvision.datasets.MNIST(tmp_path, train=True)
    assert torch.equal(images.train.images[:, 0], theirs.data) and torch.equal(
        images.train.labels, theirs.targets
    )
    for file in raw.iterdir():
        file.unlink()
    assert load_images("mnist", tmp_path, download=False).digest == images.digest


def test_changed_bytes_are_noticed(tmp_path):
    fake_mnist(tmp_path)
    load_images("mnist", tmp_path, download=False)
    path = tmp_path / "mnist.safetensors"
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        load_images("mnist", tmp_path, download=False)


def test_a_wrong_checksum_is_refused(tmp_path):
    fake_mnist(tmp_path, damaged=True)
    with pytest.raises(ValueError, match="MD5"):
        load_images("mnist", tmp_path, download=False)
    assert not (tmp_path / "mnist.safetensors").exists()


def test_cifar_files_that_fail_torchvisions_check_are_refused(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(pickle.dumps({"data": [1]}))
    with pytest.raises(ValueError, match="cifar10 can't be read from .*delete that folder"):
        load_images("cifar10", tmp_path, download=False)


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"junk"])
def test_unpacked_files_that_are_damaged_are_refused(tmp_path, content):
    (fake_mnist(tmp_path) / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match="mnist can't be read from .*delete that folder"):
        load_images("mnist", tmp_path, download=False)


def test_tiny_imagenet_is_read_from_its_folders(tmp_path):
    base = tmp_path / "tiny-imagenet-200"
    for k, wnid in enumerate(("n02", "n01")):
        (base / "train" / wnid / "images").mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (64, 64), (80 * k, 10, i)).save(
                base / "train" / wnid / "images" / f"{wnid}_{i}.JPEG"
            )
    (base / "val" / "images").mkdir(parents=True)
    Image.new("L", (64, 64), 9).save(base / "val" / "images" / "val_0.JPEG")
    (base / "val" / "val_annotations.txt").write_text(
        "val_0.JPEG\tn02\t0\t0\t1\t1\nval_1.JPEG\tn99\t0\t0\t1\t1\n", encoding="utf-8"
    )
    (base / "words.txt").write_text("n01\tfish\nn02\tbird\n", encoding="utf-8")
    (base / "train" / ".DS_Store").write_text("of the Finder", encoding="utf-8")
    (base / "train" / ".hidden").mkdir()
    images = load_images("tinyimagenet", tmp_path, download=False)
    assert (
        images.classes == ("fish", "bird")
        and images.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
        and images.test.labels.tolist() == [1]
    )
    assert images.train.images.shape == (6, 3, 64, 64) and next(iter(images.train.batches(2)))[
        0
    ].shape == (2, 3, 32, 32)


def test_missing_data_is_one_line(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load_images("cifar100", tmp_path / "none", download=False)
    text = str(error.value)
    assert (
        "cifar100 is missing" in text
        and str(tmp_path) in text
        and "FISHER_UNLEARN_DATA" in text
        and not (tmp_path / "none").exists()
    )


def test_a_download_that_fails_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(FileNotFoundError, match="downloading it failed") as error:
        load_images("mnist", tmp_path, download=True)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "mnist.safetensors").exists()


def test_names_are_offered():
    with pytest.raises(ValueError, match="did you mean 'mnist'"):
        load_images("mnsit")
    with pytest.raises(ValueError, match="unknown fruit 'xyz': Known: apple"):
        choose("xyz", ["apple"], "fruit")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    for bad in (tmp_path / "file", tmp_path / "file" / "below", "/proc/fisher_unlearn"):
        with pytest.raises(OSError, match="cannot write in the folder"):
            writable_folder(bad)


def test_one_shot_and_empty_batches_are_refused():
    check_repeatable([(torch.zeros(1), torch.zeros(1))], "remain")
    with pytest.raises(TypeError, match="only once"):
        check_repeatable(iter([]), "remain")
    with pytest.raises(TypeError, match="again and again"):
        check_repeatable(3, "remain")
    with pytest.raises(ValueError, match="empty"):
        check_repeatable([], "remain")
    with pytest.raises(ValueError, match="`size` is 0"):
        data.Samples(*made(3), (0.0,) * 3, (1.0,) * 3, 10).batches(0)


class Stream(IterableDataset):
    "Batches or samples that are read from one iterator, or from a new one each time."

    def __init__(self, once):
        self.items = [(torch.zeros(2), 0), (torch.ones(2), 1)]
        self.left = iter(self.items) if once else None

    def __iter__(self):
        return self.left or iter(self.items)


class Wrapped:
    "A loader of someone's that adds nothing."

    def __init__(self, inner):
        self.inner = inner

    def __iter__(self):
        return iter(self.inner)


@pytest.mark.parametrize("wrap", [lambda s: s, DataLoader, lambda s: Wrapped(s)])
def test_what_reads_on_from_one_iterator_is_refused_before_anything_is_lost(wrap):
    once = Stream(once=True)
    with pytest.raises(TypeError, match="`remain` can be read only once.*begin anew"):
        check_repeatable(wrap(once), "remain")
    assert len(list(once)) == 2
    check_repeatable(wrap(Stream(once=False)), "remain")


def test_workers_that_persist_share_one_iterator_and_begin_anew():
    data = TensorDataset(torch.zeros(4, 2), torch.zeros(4))
    loader = DataLoader(data, 2, num_workers=1, persistent_workers=True)
    assert iter(loader) is iter(loader)
    check_repeatable(loader, "remain")
    check_repeatable(Wrapped(loader), "remain")


# ---- values that make no sense


def four(**changed):
    "Four images with something changed."
    given = {
        "images": made(4)[0],
        "labels": torch.arange(4),
        "mean": (0.5,) * 3,
        "std": (0.2,) * 3,
        "size": 10,
    } | changed
    return data.Samples(**given)


@pytest.mark.parametrize(
    "bad",
    [
        {"std": (0.2, math.nan, 0.2)},
        {"std": (0.2, math.inf, 0.2)},
        {"std": (0.2, 0, 0.2)},
        {"std": 0.2},
        {"mean": (math.nan,) * 3},
        {"mean": "abc"},
        {"mean": (True,) * 3},
        {"labels": torch.tensor([0, -1, 2, 3])},
        {"labels": [0, 1, 2, 3]},
        {"size": 0},
        {"size": 2.5},
        {"size": True},
        {"size": 2**70},
        {"images": None},
        {"image": None},
    ],
)
def test_samples_that_make_no_sense_are_one_sentence(bad):
    with pytest.raises((TypeError, ValueError)) as error:
        four(**bad)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


@pytest.mark.parametrize(
    "bad",
    [
        lambda s: s.batches(True),
        lambda s: s.batches(0),
        lambda s: s.batches(math.nan),
        lambda s: s.batches("8"),
        lambda s: s.batches(2**70),
        lambda s: s.batches(8, "gpu"),
        lambda s: s.batches(8, 3),
        lambda s: s.batches(sise=3),
        lambda s: s[99:100][5],
        lambda s: s[torch.tensor([4])],
        lambda s: s[torch.tensor([-5])],
        lambda s: s[torch.ones(3, dtype=torch.bool)],
        lambda s: s["x"],
        lambda s: s[[1.5]],
        lambda s: s[None],
        lambda s: data.pad_or_resize(s.images, 0),
        lambda s: data.pad_or_resize(s.images.float(), 8),
        lambda s: data.pad_or_resize(s.images[0], 8),
        lambda s: s.batches(2).shuffled(3),
        lambda s: data.ImageData("x", s, s, ("a", "b"), "here", "0"),
        lambda s: data.ImageData("x", s, s, "abcd", "here", "0"),
        lambda s: data.ImageData("x", s, s, ("a", "b", "c", "d"), "here", "0").subset(True, 0),
        lambda s: data.ImageData("x", s, s, ("a", "b", "c", "d"), "here", "0").held_out(1, -1),
        lambda s: data.ImageData("x", s, s, ("a", "b", "c", "d"), "here", "0").resized(math.inf),
        lambda s: data.digest("x"),
        lambda s: data.load_images(3),
        lambda s: data.load_images("digits", download="no"),
        lambda s: data.load_images("digits", 3),
        lambda s: data.find_data(3),
        lambda s: data.writable_folder(None),
    ],
)
def test_calls_that_make_no_sense_are_one_sentence(bad):
    with pytest.raises((TypeError, ValueError)) as error:
        bad(four())
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_samples_are_chosen_in_many_ways():
    part = four()
    for index in (
        slice(1, 3),
        [1, 2],
        (1, 2),
        np.array([1, 2]),
        torch.tensor([1, 2]),
        torch.tensor([1, 2], dtype=torch.int32),
        torch.tensor([False, True, True, False]),
        [-3, -2],
    ):
        assert part[index].labels.tolist() == [1, 2]
    assert len(part[[]]) == len(part[torch.zeros(0, dtype=torch.long)]) == len(part[4:]) == 0
